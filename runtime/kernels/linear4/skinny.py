"""Products of few tokens with 4-bit matrices on CUDA: how `skinny.cu` is launched.

M tokens, N rows, K columns, A experts chosen for each token.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.kernels.device import multiprocessors, shared_limit
from minibble.runtime.kernels.linear4 import few
from minibble.runtime.kernels.linear4.few import TABLE_STRIDES
from minibble.runtime.kernels.nvrtc import Kernel
from minibble.runtime.kernels.tiles import CODES_NBYTES, COLUMNS, TileLayout

SOURCES = (
    *few.SOURCES,
    "skinny_shape.cuh",
    "skinny_work.cuh",
    "skinny_multiply.cuh",
    "skinny_output.cuh",
    "skinny.cu",
)
TOKENS = 8  # in one pass over the weights
MAX_SPLITS = 4
MAX_TOKENS = 64  # that the list of jobs has room for
MAX_EXPERTS = 128  # a thread each
# Of a block; with 4 warps it finds room in the 99 KB of shared memory of cards of compute capability 8.6 and 8.9.
# docs/adr/0011-few-tokens.md has the measurements behind this and what follows.
WARPS = (12, 4)
IN_FLIGHT = 24  # half chunks of all warps: more of them delay the next kernel's ids and activations
FIRST_SLOTS = 2  # of each warp, asked for before activations are
SEGMENT_TILES = (64, 32, 16, 8)
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
        ("matrix_start", ctypes.c_int),
        ("codes", few.Codes),
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

    BFLOAT16 gives [M, N], of a matrix that is not cut; PARTS sums that add up to it, float32 [splits, M, N].
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
    assert splits == 1 or epilogue in (PARTS, DOWN)
    lists, rows = _lists_nbytes(M, active, experts), _job_rows(M, active)
    shape = _shape(layout, rows, splits, lists, shared_limit(device))
    assert shape.slots, f"{layout.K} columns of {M} tokens do not fit into shared memory"
    args = _Args(
        epilogue,
        *(None if t is None else t.data_ptr() for t in (table, operand.data, ids, weights, x, out)), M, active, experts,
        layout.N // 2 if epilogue == GATE_UP else layout.N, layout.K, layout.tiles, layout.chunks, splits,
        rows, shape.slots, min(FIRST_SLOTS, shape.slots), shape.segment_tiles, shape.sum_rows,
        operand.start, few.codes_of(layout), None if units is None else units.data_ptr(),
    )  # fmt: skip
    kernel = _kernel(
        shape.warps, few.scale_kind(layout), layout.scale_columns, shape.table_stride, units is not None
    )  # fmt: skip
    with torch.cuda.device_of(x):
        kernel.launch(multiprocessors(device), 32 * shape.warps, [args], shape.nbytes, overlap=True)


@cache
def splits_for(layout: TileLayout, M: int, device: torch.device, active: int = 1, experts: int = 0) -> int:
    """Into how many parts of K to cut the matrix, so that its work divides well and tokens fit into shared memory.

    `active` of `experts` are chosen for each token; 0 for a matrix that takes all. 0 if so many tokens do not fit.
    """
    processors, limit = multiprocessors(device), shared_limit(device)
    jobs = active if experts else -(-M // TOKENS)
    units = layout.tiles * jobs
    found: list[tuple[int, float, int]] = []
    rows, lists = _job_rows(M, active), _lists_nbytes(M, active, experts)
    for splits in range(1, min(layout.chunks, MAX_SPLITS) + 1):
        shape = _shape(layout, rows, splits, lists, limit)
        idle = -(-units * splits // processors) * processors / (units * splits)
        second = _SECOND_SEGMENT if _cut_by_groups(jobs * splits, layout.tiles, processors) else 0.0
        if shape.slots:
            found.append((-shape.warps, round(idle + second, 1), splits))
    return min(found)[2] if found else 0


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
        if splits and _shape(layout, _job_rows(M, active), splits, lists, limit).slots:
            return M
    return 0


def _job_rows(M: int, active: int) -> int:
    """Most rows of x of a job: a token may choose an expert twice."""
    return min(TOKENS, M * active)


def _lists_nbytes(M: int, active: int, experts: int) -> int:
    """Of the lists of jobs in shared memory."""
    jobs = M * active if experts else -(-M // TOKENS)
    return 4 * ((TOKENS + 3) * jobs + (jobs + experts if experts else 0))


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
    ring = warps * slots * (layout.chunk_nbytes - CODES_NBYTES // 2 + 8)
    x = token_rows * (-(-layout.chunks // splits) * 2 * COLUMNS + 16)
    fixed = few.tables_nbytes(layout, segment, stride) + ring + x + other
    sum_rows = min((limit - fixed) // _SUMS_NBYTES, (segment + warps) * token_rows)
    least = min(segment, 16 if stride == TABLE_STRIDES[0] else 8) + warps
    if sum_rows < least * token_rows:
        return None
    return _Shape(warps, slots, segment, sum_rows, fixed + sum_rows * _SUMS_NBYTES, stride)


@cache
def _kernel(
    warps: int, scale_kind: int, scale_columns: int, table_stride: int = 256, divided: bool = False
) -> Kernel:  # fmt: skip
    macros: dict[str, int | str] = {
        "WARPS": warps, "TABLE_STRIDE": table_stride,
        "SCALE_KIND": scale_kind, "SCALE_COLUMNS": scale_columns, "DIVIDED": int(divided),
    }  # fmt: skip
    return Kernel("skinny", [Path(__file__).with_name(name) for name in SOURCES], macros)
