"""The layout of 4-bit matrices that the GPU kernels read, made from the stored form by moving bytes.

A matrix [N, K] is tiles of 32 rows, a tile is chunks of 256 columns, and a chunk is contiguous: 4096 bytes of codes,
then its scales. The bytes of codes keep the stored pairs (two neighbouring columns, the even one in the high nibble)
in the order in which the tensor cores' A operand holds them: [64 columns][16 rows][lane][16 columns][register]. So a
lane's 16 bytes are its registers for four steps of `mma.m16n8k16`, and of a warp's part of `wgmma.m64k16`. After the
tiles come, for double quantization, a first block and an offset for every 16 rows, and the second-level scales.
docs/adr/0009-kernel-layout.md says why.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import CODEBOOK, decode_absmax, zero_byte
from minibble.quantize.tensors import NESTED_BLOCK, Levels, QuantizedTensor
from minibble.runtime.kernels import nvrtc, reference_forced

ROWS, COLUMNS = 32, 256  # of a chunk
CODES_NBYTES = ROWS * COLUMNS // 2
BLOCK = 64  # columns that share a scale in NF4
ALIGNMENT = 256
GROUPS = (32, 64, 128)  # of int4; multiples of 128 are stored as groups of 128
# NF4's levels times this are nearest to bfloat16 numbers: their error, weighted by how often Gaussian weights take
# them, is 0.8e-3 of their size instead of 1.4e-3. Scales are divided by it.
LEVEL_SCALE = 1.43671
# What weights of float16 are multiplied by in kernels: those from 1e-6 to 1,000 keep all bits.
HALF_SCALE = 64.0


def usable(dtype: torch.dtype) -> bool:
    """True where kernels that read the layout can be compiled, and take activations of `dtype`."""
    return dtype == torch.bfloat16 and nvrtc.available() and not reference_forced()


@dataclass(frozen=True)
class TileLayout:
    """Sizes and places of a matrix [N, K] in the layout.

    `part_rows` are the rows of the matrices that it is made of, one under the other, or alternating by 16 rows if
    `interleaved`. `scale_nbytes` and `scale_columns` are of one scale; `nested` says that it is double quantization's.
    """

    part_rows: tuple[int, ...]
    K: int
    levels: Levels
    scale_nbytes: int
    scale_columns: int
    nested: bool
    interleaved: bool = False

    def __post_init__(self) -> None:
        assert not self.interleaved or len(set(self.part_rows)) == 1
        assert len(self.part_rows) == 1 or self.interleaved or not any(rows % 16 for rows in self.part_rows[:-1])

    @classmethod
    def of(cls, parts: Sequence[QuantizedTensor], interleaved: bool = False) -> "TileLayout | None":
        """The layout of the rows of `parts`; None if it cannot hold their shapes or their group size."""
        first = parts[0]
        nested, rows = first.nested_absmax is not None, tuple(q.shape[0] for q in parts)
        return cls.make(rows, first.shape[1], first.levels, first.block_size, nested, interleaved)

    @classmethod
    def of_format(cls, rows: tuple[int, ...], K: int, format: Format, interleaved: bool = False) -> "TileLayout | None":
        """The layout of matrices of `rows` and K columns in `format`; None as in `of`."""
        nested = bool(getattr(format, "double_quant", False))
        return cls.make(rows, K, format.levels, format.block_size, nested, interleaved)

    @classmethod
    def make(
        cls, rows: tuple[int, ...], K: int, levels: Levels, block_size: int, nested: bool, interleaved: bool = False
    ) -> "TileLayout | None":
        """The layout of matrices of `rows` and K columns, of which `block_size` share a scale; None as in `of`."""
        if K % block_size or any(n % 16 for n in (rows if interleaved else rows[:-1])):
            return None
        if levels == "int4":
            columns = block_size if block_size in GROUPS else 128 if block_size % 128 == 0 else 0
            return cls(rows, K, "int4", 2, columns, False, interleaved) if columns else None
        if block_size != BLOCK:
            return None
        nested = nested and K % COLUMNS == 0
        return cls(rows, K, "nf4", 1 if nested else 4, BLOCK, nested, interleaved)

    @property
    def N(self) -> int:
        return sum(self.part_rows)

    @cached_property
    def tiles(self) -> int:
        """Tiles of 32 rows."""
        return -(-sum(-(-rows // 16) for rows in self.part_rows) // 2)

    @property
    def chunks(self) -> int:
        """Chunks of 256 columns in a tile."""
        return -(-self.K // COLUMNS)

    @property
    def chunk_nbytes(self) -> int:
        return CODES_NBYTES + ROWS * (COLUMNS // self.scale_columns) * self.scale_nbytes

    @property
    def tiles_nbytes(self) -> int:
        return self.tiles * self.chunks * self.chunk_nbytes

    @property
    def meta_start(self) -> int:
        """Where first blocks and offsets lie, 8 bytes for every 16 rows."""
        return _aligned(self.tiles_nbytes)

    @property
    def nested_start(self) -> int:
        """Where the second-level scales lie, float32."""
        return _aligned(self.meta_start + 16 * self.tiles)

    @cached_property
    def nested_counts(self) -> tuple[int, ...]:
        """Second-level scales of each part, those of padded rows included."""
        per_row = self.K // BLOCK
        return tuple(-(-up(rows, 16) * per_row // NESTED_BLOCK) for rows in self.part_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, a multiple of ALIGNMENT."""
        if not self.nested:
            return self.meta_start
        return _aligned(self.nested_start + 4 * sum(self.nested_counts))


def kernel_levels(levels: Levels, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The 16 levels as the kernels multiply with them, float32 that `dtype` can hold, bfloat16 or float16."""
    table = torch.tensor(CODEBOOK) if levels == "nf4" else torch.arange(-8.0, 8.0)
    return (table * level_scale(levels, dtype)).to(dtype).float()


def level_scale(levels: Levels, dtype: torch.dtype = torch.bfloat16) -> float:
    """What kernel levels of `dtype` are larger than the stored ones; scales are divided by it."""
    return LEVEL_SCALE if levels == "nf4" and dtype == torch.bfloat16 else 1.0


def byte_levels(levels: Levels, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """For each byte the two kernel levels it stands for, of `dtype`, that of the high nibble first: int32 [256]."""
    table, byte = kernel_levels(levels, dtype).to(dtype), torch.arange(256)
    return torch.stack((table[byte >> 4], table[byte & 0xF]), dim=1).view(torch.int32).view(256).to(device)


def pack(parts: Sequence[QuantizedTensor], layout: TileLayout, out: Tensor | None = None) -> Tensor:
    """The rows of `parts` in `layout`: uint8 [layout.nbytes], into `out` if given, on the device of the parts."""
    out = torch.empty(layout.nbytes, dtype=torch.uint8, device=parts[0].device) if out is None else out
    assert out.shape == (layout.nbytes,) and out.dtype == torch.uint8
    tiles = out[: layout.tiles_nbytes].view(layout.tiles, layout.chunks, layout.chunk_nbytes)
    padding = zero_byte(layout.levels)
    codes = _row_tiles([q.codes.view(q.shape[0], -1) for q in parts], layout, COLUMNS // 2, padding)
    codes = codes.view(layout.tiles, 2, 2, 8, layout.chunks, 4, 4, 2, 4)  # tile, rt, r+8, g, chunk, kb, s, c+8, t
    arranged = tiles[:, :, :CODES_NBYTES].view(layout.tiles, layout.chunks, 4, 2, 8, 4, 4, 2, 2)
    arranged.copy_(codes.permute(0, 4, 5, 1, 3, 8, 6, 7, 2))
    del codes  # a copy of all of them, where there are several parts
    scales = _row_tiles([_scales(q, layout) for q in parts], layout, COLUMNS // layout.scale_columns, 0)
    scales = scales.view(layout.tiles, ROWS, layout.chunks, -1).transpose(1, 2).contiguous()
    tiles[:, :, CODES_NBYTES:] = scales.view(torch.uint8).flatten(2)
    if layout.nested:
        _pack_nested(parts, layout, out)
    return out


def _row_tiles(matrices: list[Tensor], layout: TileLayout, columns: int, padding: int) -> Tensor:
    """`matrices` of equal width in the order of 16-row tiles, padded to whole tiles and chunks."""
    width = layout.chunks * columns
    padded = [_padded(m, (0, width - m.shape[1], 0, -m.shape[0] % 16), padding).view(-1, 16, width) for m in matrices]
    if layout.interleaved:
        stacked = torch.stack(padded, dim=1).flatten(0, 1)
    else:
        stacked = torch.cat(padded) if len(padded) > 1 else padded[0]
    return _padded(stacked, (0, 0, 0, 0, 0, 2 * layout.tiles - len(stacked)), padding)


def _padded(x: Tensor, margins: tuple[int, ...], value: int) -> Tensor:
    """As F.pad, but no copy where nothing is added."""
    return F.pad(x, margins, value=value) if any(margins) else x


def _scales(q: QuantizedTensor, layout: TileLayout) -> Tensor:
    """[N, scales in a row]: uint8 absmax codes, float32 or float16."""
    if layout.nested:
        return q.absmax.view(q.shape[0], -1)
    scales = q.absmax if layout.levels == "int4" else decode_absmax(q)
    return scales.view(q.shape[0], -1).repeat_interleave(q.block_size // layout.scale_columns, dim=1)


def _pack_nested(parts: Sequence[QuantizedTensor], layout: TileLayout, out: Tensor) -> None:
    per_row, start = layout.K // BLOCK, 0
    entries: list[list[bytes]] = []
    nested = out[layout.nested_start :].view(torch.float32)
    nested.zero_()
    for q, count in zip(parts, layout.nested_counts, strict=True):
        assert q.nested_absmax is not None and q.nested_offset is not None
        nested[start : start + len(q.nested_absmax)] = q.nested_absmax
        first = range(start * NESTED_BLOCK, start * NESTED_BLOCK + up(q.shape[0], 16) * per_row, 16 * per_row)
        entries.append([struct.pack("<if", block, q.nested_offset) for block in first])
        start += count
    order = list(chain(*(zip(*entries, strict=True) if layout.interleaved else entries)))
    meta = b"".join(order).ljust(16 * layout.tiles, b"\0")
    place = out[layout.meta_start : layout.meta_start + len(meta)]
    place.copy_(torch.frombuffer(bytearray(meta), dtype=torch.uint8))


def up(n: int, multiple: int) -> int:
    """`n`, or what is more of a multiple."""
    return -(-n // multiple) * multiple


def _aligned(nbytes: int) -> int:
    return up(nbytes, ALIGNMENT)
