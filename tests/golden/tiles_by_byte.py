"""A matrix in the kernels' layout, each weight looked up on its own."""

import struct

import torch

from minibble.quantize.nf4_math import CODEBOOK, dynamic_map
from minibble.runtime.kernels.tiles import TileLayout


def read_back(data: bytes, layout: TileLayout) -> torch.Tensor:
    """The matrix [padded rows, padded K], float32, each weight looked up on its own; rows in the order of the tiles."""
    levels = CODEBOOK if layout.levels == "nf4" else range(-8, 8)
    table, rows, columns = dynamic_map().tolist(), 32 * layout.tiles, 256 * layout.chunks
    out = torch.empty(rows, columns)
    for row in range(rows):
        tile, rt, in_tile = row // 32, row // 16 % 2, row % 16
        g, lower = in_tile % 8, in_tile // 8
        for column in range(columns):
            chunk, kb, s = column // 256, column // 64 % 4, column // 16 % 4
            t, right = column % 8 // 2, column // 8 % 2
            start = (tile * layout.chunks + chunk) * layout.chunk_nbytes
            byte = data[start + ((kb * 2 + rt) * 32 + 4 * g + t) * 16 + 4 * s + 2 * right + lower]
            code = byte & 0xF if column % 2 else byte >> 4
            per_row = 256 // layout.scale_columns
            index = row % 32 * per_row + column % 256 // layout.scale_columns
            at = start + 4096 + index * layout.scale_nbytes
            if layout.nested:
                first, offset = struct.unpack_from("<if", data, layout.meta_start + 8 * (row // 16))
                block = first + in_tile * (layout.K // 64) + column // 64
                nested = struct.unpack_from("<f", data, layout.nested_start + 4 * (block >> 8))[0]
                scale = table[data[at]] * nested + offset
            else:
                scale = struct.unpack_from("<f" if layout.scale_nbytes == 4 else "<e", data, at)[0]
            out[row, column] = levels[code] * scale
    return out
