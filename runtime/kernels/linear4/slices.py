"""Products of few tokens with one 4-bit matrix on CUDA: how `slices.cu` is launched.

M tokens, N rows, K columns.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.kernels.device import multiprocessors, shared_limit
from minibble.runtime.kernels.linear4 import skinny
from minibble.runtime.kernels.nvrtc import Kernel
from minibble.runtime.kernels.tiles import CODES_NBYTES, ROWS, TileLayout

SOURCES = ("skinny_ptx.cuh", "table_entry.cuh", "few_codes.cuh", "slices.cu")
MAX_TOKENS = 16
MAX_SPLITS = 8
WARPS = range(12, 17)  # of a block, each with 128 columns
BUFFERS = 2
IN_FLIGHT = 24
FIRST_SLOTS = 18


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "out", "parts")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "tiles", "chunks", "splits")),
        *((name, ctypes.c_int) for name in ("blocks", "first_slots", "block_tiles")),
        *((name, ctypes.c_int) for name in ("meta_start", "nested_start", "nested_count", "nested_span")),
        ("parts_count", ctypes.c_int),
        ("interleaved", ctypes.c_int),
        ("part_start", ctypes.c_int * skinny.MAX_PARTS),
        ("part_nested", ctypes.c_int * skinny.MAX_PARTS),
        ("levels", ctypes.c_uint16 * 16),
        ("map", ctypes.c_float * 256),
        ("unscale", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Splits of K, warps of a block, blocks of each split but the last, most tiles of a block, half chunks that a warp
    keeps in flight, bytes of shared memory, and of the table of levels from entry to entry."""

    splits: int
    warps: int
    blocks: int
    block_tiles: int
    slots: int
    nbytes: int
    table_stride: int


@cache
def shape_for(layout: TileLayout, M: int, device: torch.device) -> Shape | None:
    """How the product of M tokens is cut up; None where slices do not divide, or do not fit."""
    if layout.K % 128 or not 0 < M <= MAX_TOKENS:
        return None
    processors, limit, slices = multiprocessors(device), shared_limit(device), layout.K // 128
    found: list[tuple[int, int, Shape]] = []
    for splits in range(1, MAX_SPLITS + 1):
        warps, odd = divmod(slices, splits)
        if odd or warps not in WARPS or processors < splits:
            continue
        most = -(-layout.tiles // (processors // splits))
        blocks = -(-layout.tiles // most)
        for stride in (256, 128) if layout.levels == "nf4" else (128,):
            slots = max(2, IN_FLIGHT // warps)
            nbytes = _shared_nbytes(layout, M, warps, slots, most, stride)
            if nbytes <= limit:
                found.append((most * warps, warps, Shape(splits, warps, blocks, most, slots, nbytes, stride)))
                break
    return min(found, key=lambda one: one[:2])[2] if found else None


def _shared_nbytes(layout: TileLayout, M: int, warps: int, slots: int, tiles: int, stride: int) -> int:
    nested = 1024 + tiles * (16 + 8 * skinny._nested_span(layout)) if layout.nested else 0
    table = 256 * stride if layout.levels == "nf4" else 0
    slot = layout.chunk_nbytes - CODES_NBYTES // 2
    return table + BUFFERS * warps * _tokens(M) * 144 + warps * slots * (slot + 16) + 16 * BUFFERS + nested


def _tokens(M: int) -> int:
    return 8 if M <= 8 else 16


def launch(layout: TileLayout, data: Tensor, shape: Shape, x: Tensor, out: Tensor) -> None:
    """Multiply the rows of `x`, bfloat16 [M, K], into `out`, bfloat16 [M, N] or the splits' sums float32 [S, M, N]."""
    M, device = x.shape[0], x.device
    assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] == layout.K and x.data_ptr() % 16 == 0
    assert out.is_contiguous() and out.data_ptr() % 16 == 0
    parts = skinny.partial_sums(device) if out.dtype == torch.bfloat16 else None
    assert parts is None or (shape.splits - 1) * layout.tiles * M * ROWS <= len(parts)
    args = _Args(
        *(None if t is None else t.data_ptr() for t in (data, x, out, parts)),
        M, layout.N, layout.K, layout.tiles, layout.chunks, shape.splits,
        shape.blocks, FIRST_SLOTS, shape.block_tiles,
        layout.meta_start, layout.nested_start, sum(layout.nested_counts), skinny._nested_span(layout),
        *skinny._parts(layout), *skinny._tables(layout.levels),
    )  # fmt: skip
    kind = 0 if layout.nested else 1 if layout.levels == "nf4" else 2
    kernel = _kernel(shape.warps, kind, layout.scale_columns, _tokens(M), shape.table_stride, shape.slots)
    grid = multiprocessors(device)
    with torch.cuda.device_of(x):
        kernel.launch(grid, 32 * shape.warps, [args], shape.nbytes, overlap=True)


@cache
def _kernel(warps: int, scale_kind: int, scale_columns: int, tokens: int, table_stride: int, slots: int) -> Kernel:
    macros: dict[str, int | str] = {
        "WARPS": warps, "TOKENS": tokens, "TABLE_STRIDE": table_stride,
        "SCALE_KIND": scale_kind, "SCALE_COLUMNS": scale_columns, "SLOTS": slots,
    }  # fmt: skip
    return Kernel("slices", [Path(__file__).with_name(name) for name in SOURCES], macros)
