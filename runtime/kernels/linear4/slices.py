"""Products of few tokens with one 4-bit matrix on CUDA: how `slices.cu` is launched.

M tokens, N rows, K columns, S splits of K.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.kernels.counters import Held, of_stream
from minibble.runtime.kernels.device import multiprocessors, shared_limit
from minibble.runtime.kernels.linear4 import few
from minibble.runtime.kernels.nvrtc import Kernel
from minibble.runtime.kernels.tiles import CODES_NBYTES, ROWS, TileLayout, up

SOURCES = (*few.SOURCES, "slices_shape.cuh", "slices_multiply.cuh", "slices_sums.cuh", "slices.cu")
COLUMNS = 128  # of a slice, half of a chunk's
MAX_TOKENS = 16
MAX_SPLITS = 4
MAX_PARTIAL_SUMS = 1 << 21  # of blocks that share a tile, on their way to the last
# docs/adr/0015-standing-activations.md has the measurements behind what follows.
WARPS = range(12, 17)  # of a block: fewer leave multiprocessors idle, more leave too few registers
SLOTS = 2  # half chunks that a warp keeps in flight
FIRST_SLOTS = 18  # of all warps, asked for before activations are, which would wait for more
_BUFFERS = 2  # tiles whose sums can wait
_SUM_NBYTES = 144  # of 32 sums


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "out", "parts")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "tiles", "chunks", "splits")),
        *((name, ctypes.c_int) for name in ("blocks", "block_tiles", "first_slots")),
        ("codes", few.Codes),
    ]


@dataclass(frozen=True)
class Shape:
    """Splits of K, warps of a block, blocks of each split but the last, most tiles of a block, bytes of shared memory,
    and of the table of levels from entry to entry."""

    splits: int
    warps: int
    blocks: int
    block_tiles: int
    nbytes: int
    table_stride: int


@cache
def shape_for(layout: TileLayout, M: int, device: torch.device) -> Shape | None:
    """How the product of M tokens is cut up; None where K is no multiple of as many slices as a block has warps, or
    where that does not fit."""
    if layout.K % COLUMNS or not 0 < M <= MAX_TOKENS:
        return None
    processors = multiprocessors(device)
    found = []
    for splits in range(1, min(MAX_SPLITS, processors) + 1):
        warps, left = divmod(layout.K // COLUMNS, splits)
        if left or warps not in WARPS or (splits - 1) * layout.tiles * up(M, 4) * ROWS > MAX_PARTIAL_SUMS:
            continue
        # Blocks of the last split add the parts of all, so where tiles do not divide it is they that have fewer.
        most = -(-layout.tiles // (processors // splits))
        blocks = -(-layout.tiles // most)
        for stride in few.TABLE_STRIDES:
            nbytes = _shared_nbytes(layout, M, warps, most, stride)
            if nbytes <= shared_limit(device):
                found.append((most * warps, warps, Shape(splits, warps, blocks, most, nbytes, stride)))
                break
    return min(found, key=lambda one: one[:2])[2] if found else None


def _shared_nbytes(layout: TileLayout, M: int, warps: int, tiles: int, stride: int) -> int:
    slot = layout.chunk_nbytes - CODES_NBYTES // 2 + 16
    sums = _BUFFERS * _tokens(M) * _SUM_NBYTES
    return few.tables_nbytes(layout, tiles, stride) + warps * (SLOTS * slot + sums) + 16 * _BUFFERS


def _tokens(M: int) -> int:
    return 8 if M <= 8 else 16


def launch(layout: TileLayout, data: Tensor, shape: Shape, x: Tensor, out: Tensor) -> None:
    """Multiply the rows of `x`, bfloat16 [M, K], by the matrix `data` into `out`, on torch's current stream.

    `out` is bfloat16 [M, N], or takes sums over the splits of K that add up to it, float32 [S, M, N]. Weights are read
    before the kernel ahead has ended: they must not be what it writes.
    """
    M, device = x.shape[0], x.device
    assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] == layout.K and x.data_ptr() % 16 == 0
    assert out.is_contiguous() and out.data_ptr() % 16 == 0
    parts = partial_sums(device) if out.dtype == torch.bfloat16 else None
    args = _Args(
        *(None if t is None else t.data_ptr() for t in (data, x, out, parts)),
        M, layout.N, layout.K, layout.tiles, layout.chunks, shape.splits,
        shape.blocks, shape.block_tiles, FIRST_SLOTS, few.codes_of(layout),
    )  # fmt: skip
    kernel = _kernel(shape.warps, few.scale_kind(layout), layout.scale_columns, _tokens(M), shape.table_stride)
    with torch.cuda.device_of(x):
        kernel.launch(multiprocessors(device), 32 * shape.warps, [args], shape.nbytes, overlap=True)


_partial_sums: Held[Tensor] = {}


def partial_sums(device: torch.device) -> Tensor:
    """int32 [MAX_PARTIAL_SUMS], for float32 sums on their way between blocks of the current stream's next kernel, which
    leaves it full of -1, as it finds it: none has come."""
    return of_stream(
        _partial_sums, device, lambda: torch.full((MAX_PARTIAL_SUMS,), -1, dtype=torch.int32, device=device)
    )


@cache
def _kernel(warps: int, scale_kind: int, scale_columns: int, tokens: int, table_stride: int) -> Kernel:
    macros: dict[str, int | str] = {
        "WARPS": warps, "TOKENS": tokens, "SLOTS": SLOTS, "TABLE_STRIDE": table_stride,
        "SCALE_KIND": scale_kind, "SCALE_COLUMNS": scale_columns,
    }  # fmt: skip
    return Kernel("slices", [Path(__file__).with_name(name) for name in SOURCES], macros)
