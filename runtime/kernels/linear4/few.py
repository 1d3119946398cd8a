"""What the kernels for few tokens share: how they are told of a matrix's codes and scales."""

import ctypes
from functools import cache
from typing import Any

import torch

from minibble.quantize.nf4_math import dynamic_map
from minibble.quantize.tensors import Levels
from minibble.runtime.kernels.tiles import TileLayout, kernel_levels, level_scale

SOURCES = ("few_ptx.cuh", "table_entry.cuh", "few_codes.cuh", "few_output.cuh")
MAX_PARTS = 4  # matrices one under the other
TABLE_STRIDES = (256, 128)  # bytes from entry to entry: an instruction less for each look-up, or half of the room


class Codes(ctypes.Structure):
    """few_codes.cuh's Codes."""

    _fields_ = [
        ("levels", ctypes.c_uint16 * 16),
        ("map", ctypes.c_float * 256),
        ("unscale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("meta_start", "nested_start", "nested_count", "nested_span")),
        ("parts_count", ctypes.c_int),
        ("interleaved", ctypes.c_int),
        ("part_start", ctypes.c_int * MAX_PARTS),
        ("part_nested", ctypes.c_int * MAX_PARTS),
    ]  # fmt: skip


@cache
def codes_of(layout: TileLayout) -> Codes:
    """Those of a matrix in `layout`."""
    return Codes(
        *_tables(layout.levels),
        layout.meta_start, layout.nested_start, sum(layout.nested_counts), _nested_span(layout), *_parts(layout),
    )  # fmt: skip


def scale_kind(layout: TileLayout) -> int:
    """few_codes.cuh's SCALE_KIND."""
    return 0 if layout.nested else 1 if layout.levels == "nf4" else 2


def tables_nbytes(layout: TileLayout, tiles: int, table_stride: int) -> int:
    """Shared memory that few_codes.cuh's Tables take, for so many tiles of second-level scales at once."""
    nested = 1024 + tiles * (16 + 8 * _nested_span(layout)) if layout.nested else 0
    return nested + (256 * table_stride if layout.levels == "nf4" else 0)


def _nested_span(layout: TileLayout) -> int:
    """Second-level scales that 16 rows can touch."""
    return (16 * (layout.K // 64) + 510) // 256


@cache
def _tables(levels: Levels) -> tuple[Any, ...]:
    """The kernel's levels as bfloat16 bits, the first-level table of double quantization, and what scales take."""
    bits = kernel_levels(levels).bfloat16().view(torch.int16).tolist()
    unscale = 1 / level_scale(levels)
    scaled = (dynamic_map() * unscale).tolist()
    return (ctypes.c_uint16 * 16)(*(b & 0xFFFF for b in bits)), (ctypes.c_float * 256)(*scaled), unscale


def _parts(layout: TileLayout) -> tuple[Any, ...]:
    """Of the matrices that make up one: their number, whether they alternate, and where each begins."""
    rows, counts = layout.part_rows, layout.nested_counts
    assert len(rows) <= MAX_PARTS, f"{len(rows)} matrices in one"
    array = ctypes.c_int * MAX_PARTS
    starts = (sum(-(-n // 16) for n in rows[:i]) for i in range(len(rows)))
    return len(rows), int(layout.interleaved), array(*starts), array(*(sum(counts[:i]) for i in range(len(rows))))
