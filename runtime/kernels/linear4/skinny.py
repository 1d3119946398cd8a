"""Products of few tokens with 4-bit matrices on CUDA: how `skinny.cu` is launched.

M tokens, N rows, K columns, A experts chosen for each token.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.nf4_math import dynamic_map
from minibble.quantize.tensors import Levels
from minibble.runtime.kernels.counters import Held, of_stream
from minibble.runtime.kernels.device import multiprocessors, shared_limit
from minibble.runtime.kernels.nvrtc import Kernel
from minibble.runtime.kernels.tiles import CODES_NBYTES, COLUMNS, TileLayout, kernel_levels, level_scale

SOURCES = (
    "skinny_ptx.cuh",
    "skinny_shape.cuh",
    "table_entry.cuh",
    "skinny_work.cuh",
    "skinny_multiply.cuh",
    "skinny_output.cuh",
    "skinny.cu",
)
TOKENS = 8  # in one pass over the weights; a matrix that takes all tokens has 16 where there are more
MAX_SPLITS = 4
MAX_PARTS = 4  # matrices one under the other
MAX_TOKENS = 64  # that the list of jobs has room for
MAX_EXPERTS = 128  # a thread each
MAX_PARTIAL_SUMS = 1 << 21  # of blocks that share a tile, on their way to the last
# Of a block; with 4 warps it finds room in the 99 KB of shared memory of cards of compute capability 8.6 and 8.9.
# docs/adr/0011-few-tokens.md has the measurements behind this and what follows.
WARPS = (12, 4)
IN_FLIGHT = 24  # half chunks of all warps: more of them delay the next kernel's ids and activations
FIRST_SLOTS = 2  # of each warp, asked for before activations are
SEGMENT_TILES = (64, 32, 16, 8)
TABLE_STRIDES = (256, 128)  # bytes from entry to entry: an instruction less for each look-up, or half of the room
_SECOND_SEGMENT = 0.4  # of the time that a product takes, for sums in between and other activations: 4 us of 10
_SUMS_NBYTES = 36 * 4  # of 32 sums
# What sums become: skinny.cu's Epilogue.
BFLOAT16, PARTS, GATE_UP, DOWN = range(4)


class _Args(ctypes.Structure):
    _fields_ = [
        ("epilogue", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("table", "matrix", "ids", "weights", "x", "out")),
        *((name, ctypes.c_int) for name in ("M", "active", "experts", "N", "K", "tiles", "chunks", "splits")),
        *((name, ctypes.c_int) for name in ("token_rows", "slots", "first_slots", "segment_tiles", "sum_rows")),
        *((name, ctypes.c_int) for name in ("matrix_start", "meta_start", "nested_start", "nested_count")),
        ("nested_span", ctypes.c_int),
        ("parts", ctypes.c_void_p),
        ("parts_count", ctypes.c_int),
        ("interleaved", ctypes.c_int),
        ("part_start", ctypes.c_int * MAX_PARTS),
        ("part_nested", ctypes.c_int * MAX_PARTS),
        ("levels", ctypes.c_uint16 * 16),
        ("map", ctypes.c_float * 256),
        ("unscale", ctypes.c_float),
        ("units", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """Where a matrix lies: in `data`, or one of each expert `start` bytes after the addresses in `table`, int64 [E].

    Weights and addresses are read before the kernel ahead has ended, and so are the ids of DOWN: they must not be what
    it writes.
    """

    layout: TileLayout
    data: Tensor | None = None
    table: Tensor | None = None
    start: int = 0


def launch(
    operand: Operand,
    epilogue: int,
    x: Tensor,
    out: Tensor,
    *,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    units: Tensor | None = None,
    splits: int = 1,
) -> None:
    """Multiply the rows of `x`, bfloat16 [rows, K], into `out` as `epilogue` says, on torch's current stream.

    `ids` int32 [M, A] and `weights` float32 [M, A] are the experts chosen and the router's weights. GATE_UP takes x
    [M, K] and gives bfloat16 [M * A, F]; DOWN takes [M * A, F] and gives float32 [A * splits, M, N].
    Of the hidden units of a pair whose expert no other has, only the first `units`, int32 [M, A], are computed by
    GATE_UP and used by DOWN, multiples of COLUMNS; other pairs' entries must be F.
    """
    layout, table = operand.layout, operand.table
    assert (ids is None) == (table is None)
    M, active = (x.shape[0], 1) if ids is None else (ids.shape[0], ids.shape[1])
    experts = 0 if table is None else table.numel()
    assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] == layout.K and x.data_ptr() % 16 == 0
    assert out.is_contiguous() and out.data_ptr() % 16 == 0 and M <= MAX_TOKENS and experts <= MAX_EXPERTS
    assert ids is None or (ids.dtype == torch.int32 and ids.is_contiguous())
    assert units is None or (ids is not None and units.dtype == torch.int32 and units.is_contiguous())
    device = x.device
    tokens = _job_tokens(M, experts)
    lists = _lists_nbytes(M, active, experts)
    rows = _job_rows(M, active, experts)
    shape = _shape(layout, rows, splits, lists, shared_limit(device))
    assert shape.slots, f"{layout.K} columns of {M} tokens do not fit into shared memory"
    parts = partial_sums(device) if epilogue == BFLOAT16 and splits > 1 else None
    assert parts is None or _parts_count(layout, M, splits) <= len(parts), f"{layout.N} rows are too many to split"
    args = _Args(
        epilogue,
        *(None if t is None else t.data_ptr() for t in (table, operand.data, ids, weights, x, out)), M, active, experts,
        layout.N // 2 if epilogue == GATE_UP else layout.N, layout.K, layout.tiles, layout.chunks, splits,
        rows, shape.slots, min(FIRST_SLOTS, shape.slots), shape.segment_tiles, shape.sum_rows,
        operand.start, layout.meta_start, layout.nested_start, sum(layout.nested_counts), _nested_span(layout),
        None if parts is None else parts.data_ptr(), *_parts(layout), *_tables(layout.levels),
        None if units is None else units.data_ptr(),
    )  # fmt: skip
    kind = 0 if layout.nested else 1 if layout.levels == "nf4" else 2
    kernel = _kernel(shape.warps, kind, layout.scale_columns, tokens, shape.table_stride, units is not None)
    with torch.cuda.device_of(x):
        kernel.launch(multiprocessors(device), 32 * shape.warps, [args], shape.nbytes, overlap=True)


@cache
def splits_for(layout: TileLayout, M: int, device: torch.device, active: int = 1, experts: int = 0) -> int:
    """Into how many parts of K to cut the matrix, so that its work divides well and tokens fit into shared memory.

    `active` of `experts` are chosen for each token; 0 for a matrix that takes all. 0 if so many tokens do not fit.
    """
    processors, limit, tokens = multiprocessors(device), shared_limit(device), _job_tokens(M, experts)
    jobs = active if experts else -(-M // tokens)
    units = layout.tiles * jobs
    found: list[tuple[int, float, int]] = []
    rows, lists = _job_rows(M, active, experts), _lists_nbytes(M, active, experts)
    for splits in range(1, min(layout.chunks, MAX_SPLITS) + 1):
        if not experts and M <= 2 * TOKENS and _parts_count(layout, M, splits) > MAX_PARTIAL_SUMS:
            break  # more tokens have no bfloat16 results, or are another kernel's
        shape = _shape(layout, rows, splits, lists, limit)
        idle = -(-units * splits // processors) * processors / (units * splits)
        second = _SECOND_SEGMENT if _cut_by_groups(jobs * splits, layout.tiles, processors) else 0.0
        if shape.slots:
            found.append((-shape.warps, round(idle + second, 1), splits))
    return min(found)[2] if found else 0


def _parts_count(layout: TileLayout, M: int, splits: int) -> int:
    """Sums that wait in memory for each other."""
    return splits * M * 32 * layout.tiles if splits > 1 else 0


_partial_sums: Held[Tensor] = {}


def partial_sums(device: torch.device) -> Tensor:
    """int32 [MAX_PARTIAL_SUMS], for float32 sums on their way between blocks of the current stream's next kernel, which
    leaves it full of -1, as it finds it: none has come."""
    return of_stream(
        _partial_sums, device, lambda: torch.full((MAX_PARTIAL_SUMS,), -1, dtype=torch.int32, device=device)
    )


def _cut_by_groups(groups: int, tiles: int, processors: int) -> bool:
    """Whether some block's share of the units begins in one job or split and ends in another."""
    each, more = divmod(groups * tiles, processors)
    firsts = [block * each + min(block, more) for block in range(processors)]
    return not set(range(0, groups * tiles, tiles)) <= set(firsts)


@cache
def most_tokens(layout: TileLayout, device: torch.device, whole: bool, active: int = 1, experts: int = 0) -> int:
    """How many tokens may be multiplied at once, by a matrix that is not cut if `whole`; 64 where there is room."""
    limit = shared_limit(device)
    for M in (MAX_TOKENS, 32, 16, 8, 4, 2, 1):
        splits = 1 if whole else splits_for(layout, M, device, active, experts)
        lists = _lists_nbytes(M, active, experts)
        if splits and _shape(layout, _job_rows(M, active, experts), splits, lists, limit).slots:
            return M
    return 0


def _job_tokens(M: int, experts: int) -> int:
    """Most tokens of a job."""
    return TOKENS if experts or M <= TOKENS else 2 * TOKENS


def _job_rows(M: int, active: int, experts: int) -> int:
    """Most rows of x of a job: a token may choose an expert twice."""
    return min(_job_tokens(M, experts), M * active)


def _lists_nbytes(M: int, active: int, experts: int) -> int:
    """Of the lists of jobs in shared memory."""
    tokens = _job_tokens(M, experts)
    jobs = M * active if experts else -(-M // tokens)
    return 4 * ((tokens + 3) * jobs + (jobs + experts if experts else 0))


@dataclass(frozen=True)
class _Shape:
    """Of a block: warps, half chunks that each keeps in flight (0: no room), tiles of a segment, sums of 32 rows that
    there is room for, bytes of shared memory, and of the table of levels from entry to entry."""

    warps: int
    slots: int
    segment_tiles: int
    sum_rows: int
    nbytes: int
    table_stride: int = 256


@cache
def _shape(layout: TileLayout, token_rows: int, splits: int, lists: int, limit: int) -> _Shape:
    for warps in WARPS:
        for stride, slots, segment in _choices(warps, layout):
            shape = _fitted(warps, slots, segment, stride, layout, token_rows, splits, lists, limit)
            if shape:
                return shape
    return _Shape(WARPS[-1], 0, 0, 0, 0)


def _choices(warps: int, layout: TileLayout) -> Iterator[tuple[int, int, int]]:
    """Strides of the table, slots and tiles of a segment, the quicker first."""
    most = IN_FLIGHT // warps
    if layout.levels == "nf4":
        yield from ((TABLE_STRIDES[0], most, segment) for segment in SEGMENT_TILES[:2])
    yield from product(TABLE_STRIDES[1:], range(most, 1, -1), SEGMENT_TILES)


def _fitted(
    warps: int,
    slots: int,
    segment: int,
    stride: int,
    layout: TileLayout,
    token_rows: int,
    splits: int,
    other: int,
    limit: int,
) -> _Shape | None:
    """A shape with those sizes if the sums of some tiles find room as well; `other` bytes are needed besides."""
    nested = 1024 + segment * (16 + 8 * _nested_span(layout)) if layout.nested else 0
    table = 256 * stride if layout.levels == "nf4" else 0
    ring = warps * slots * (layout.chunk_nbytes - CODES_NBYTES // 2 + 8)
    x = token_rows * (-(-layout.chunks // splits) * 2 * COLUMNS + 16)
    fixed = table + ring + x + nested + other
    sum_rows = min((limit - fixed) // _SUMS_NBYTES, (segment + warps) * token_rows)
    least = min(segment, 16 if stride == TABLE_STRIDES[0] else 8) + warps
    if sum_rows < least * token_rows:
        return None
    return _Shape(warps, slots, segment, sum_rows, fixed + sum_rows * _SUMS_NBYTES, stride)


@cache
def _parts(layout: TileLayout) -> tuple[Any, ...]:
    """Of the matrices that make up one: their number, whether they alternate, and where each begins."""
    rows, counts = layout.part_rows, layout.nested_counts
    assert len(rows) <= MAX_PARTS, f"{len(rows)} matrices in one"
    array = ctypes.c_int * MAX_PARTS
    starts = (sum(-(-n // 16) for n in rows[:i]) for i in range(len(rows)))
    return len(rows), int(layout.interleaved), array(*starts), array(*(sum(counts[:i]) for i in range(len(rows))))


def _nested_span(layout: TileLayout) -> int:
    """Second-level scales that 16 rows can touch."""
    return (16 * (layout.K // 64) + 510) // 256


@cache
def _kernel(
    warps: int,
    scale_kind: int,
    scale_columns: int,
    tokens: int = TOKENS,
    table_stride: int = 256,
    divided: bool = False,
) -> Kernel:
    macros: dict[str, int | str] = {
        "WARPS": warps, "TOKENS": tokens, "TABLE_STRIDE": table_stride,
        "SCALE_KIND": scale_kind, "SCALE_COLUMNS": scale_columns, "DIVIDED": int(divided),
    }  # fmt: skip
    return Kernel("skinny", [Path(__file__).with_name(name) for name in SOURCES], macros)


@cache
def _tables(levels: Levels) -> tuple[Any, ...]:
    """The kernel's levels as bfloat16 bits, the first-level table of double quantization, and what scales take."""
    bits = kernel_levels(levels).bfloat16().view(torch.int16).tolist()
    unscale = 1 / level_scale(levels)
    scaled = (dynamic_map() * unscale).tolist()
    return (ctypes.c_uint16 * 16)(*(b & 0xFFFF for b in bits)), (ctypes.c_float * 256)(*scaled), unscale
