"""A matrix in the kernels' layout, each weight looked up on its own."""

import torch
from torch import Tensor

from minibble.quantize.nf4_math import CODEBOOK, dynamic_map
from minibble.runtime.kernels.tiles import TileLayout


def read_back(data: bytes, layout: TileLayout) -> Tensor:
    """The matrix [padded rows, padded K], float32; rows in the order of the tiles."""
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    row, column = torch.arange(32 * layout.tiles)[:, None], torch.arange(256 * layout.chunks)[None, :]
    tile, rt, in_tile = row // 32, row // 16 % 2, row % 16
    g, lower = in_tile % 8, in_tile // 8
    chunk, kb, s = column // 256, column // 64 % 4, column // 16 % 4
    t, right = column % 8 // 2, column // 8 % 2
    start = (tile * layout.chunks + chunk) * layout.chunk_nbytes
    byte = memory[start + ((kb * 2 + rt) * 32 + 4 * g + t) * 16 + 4 * s + 2 * right + lower]
    code = torch.where(column % 2 == 1, byte & 0xF, byte >> 4).long()
    index = row % 32 * (256 // layout.scale_columns) + column % 256 // layout.scale_columns
    at = start + 4096 + index * layout.scale_nbytes
    levels = torch.tensor(CODEBOOK if layout.levels == "nf4" else range(-8, 8), dtype=torch.float32)
    if layout.nested:
        meta = layout.meta_start + 8 * (row // 16)
        block = _numbers(memory, meta, torch.int32) + in_tile * (layout.K // 64) + column // 64
        # Of padding there is no block: any will do, its levels are 0.
        place = (layout.nested_start + 4 * (block >> 8)).clamp(max=len(memory) - 4)
        nested, offset = _numbers(memory, place, torch.float32), _numbers(memory, meta + 4, torch.float32)
        scale = dynamic_map()[memory[at].long()] * nested + offset
    else:
        scale = _numbers(memory, at, torch.float32 if layout.scale_nbytes == 4 else torch.float16).float()
    return levels[code] * scale


def _numbers(memory: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """Those at the addresses `at`."""
    return memory[at[..., None] + torch.arange(dtype.itemsize)].view(dtype)[..., 0]
