"""Products of few tokens with 4-bit matrices on CUDA: how `skinny.cu` is launched.

M tokens, N rows, K columns, A experts chosen for each token.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.nf4_math import dynamic_map
from minibble.quantize.tensors import Levels
from minibble.runtime.kernels.counters import COUNT, counters
from minibble.runtime.kernels.device import multiprocessors, shared_limit
from minibble.runtime.kernels.nvrtc import Kernel
from minibble.runtime.kernels.tiles import CODES_NBYTES, COLUMNS, TileLayout, kernel_levels, level_scale

SOURCES = (
    "skinny_ptx.cuh",
    "skinny_shape.cuh",
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
        *((name, ctypes.c_int) for name in ("x_nbytes", "nested_room")),
        *((name, ctypes.c_int) for name in ("matrix_start", "meta_start", "nested_start", "nested_count")),
        ("nested_span", ctypes.c_int),
        ("parts", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("parts_count", ctypes.c_int),
        ("interleaved", ctypes.c_int),
        ("part_start", ctypes.c_int * MAX_PARTS),
        ("part_nested", ctypes.c_int * MAX_PARTS),
        ("levels", ctypes.c_uint16 * 16),
        ("map", ctypes.c_float * 256),
        ("unscale", ctypes.c_float),
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


@dataclass(frozen=True)
class Product:
    """`operand` times the rows of `x`, bfloat16 [rows, K], into `out` as `epilogue` says, K cut into `splits` parts.

    BFLOAT16 gives bfloat16 [M, N], PARTS float32 [splits, M, N]. GATE_UP takes x [M, K] and gives bfloat16 [M * A, F];
    DOWN takes [M * A, F] and gives float32 [A * splits, M, N].
    """

    operand: Operand
    epilogue: int
    x: Tensor
    out: Tensor
    splits: int = 1


def launch(*products: Product, ids: Tensor | None = None, weights: Tensor | None = None) -> None:
    """Make one product, or GATE_UP and DOWN of the same experts, in one launch on torch's current stream.

    `ids` int32 [M, A] and `weights` float32 [M, A] are the experts chosen and the router's weights. Of two products the
    second waits for all of the first, so all of the GPU's processors are needed at once: no other launch of two may run
    beside it, and what else does must end by itself.
    """
    table, device = products[0].operand.table, products[0].x.device
    M, active = (products[0].x.shape[0], 1) if ids is None else (ids.shape[0], ids.shape[1])
    experts = 0 if table is None else table.numel()
    assert M <= MAX_TOKENS and experts <= MAX_EXPERTS and (ids is None) == (table is None)
    assert ids is None or (ids.dtype == torch.int32 and ids.is_contiguous())
    tokens = _job_tokens(M, experts)
    sizes = tuple((product.operand.layout, product.splits) for product in products)
    shape = _shape(sizes, min(tokens, M), _lists_nbytes(M, active, experts), shared_limit(device))
    assert shape.slots, f"{products[0].operand.layout.K} columns of {M} tokens do not fit into shared memory"
    parts = arrived = None
    if products[0].epilogue == BFLOAT16 and products[0].splits > 1:
        layout = products[0].operand.layout
        parts = torch.empty(products[0].splits, M, 32 * layout.tiles, device=device)
        arrived = counters(device)
        assert -(-M // tokens) * layout.tiles <= len(arrived), f"{layout.N} rows are too many to split"
    common = (shape, min(tokens, M), M, active, experts, ids, weights, parts, arrived)
    both = _structure(len(products))()
    for place, product in zip(both.of, products, strict=True):
        _fill(place, product, *common)
    both.blocks = counters(device).data_ptr() if len(products) > 1 else None
    first = products[0].operand.layout
    kind = 0 if first.nested else 1 if first.levels == "nf4" else 2
    kernel = _kernel(len(products), shape.warps, kind, first.scale_columns, tokens, shape.table_stride)
    with torch.cuda.device_of(products[0].x):
        kernel.launch(multiprocessors(device), 32 * shape.warps, [both], shape.nbytes, overlap=True)


def fits(products: Sequence[Product], M: int, active: int, experts: int) -> bool:
    """Whether one launch can make them for M tokens with so many experts each."""
    sizes, device = tuple((product.operand.layout, product.splits) for product in products), products[0].x.device
    lists = _lists_nbytes(M, active, experts)
    if len({(layout.levels, layout.nested, layout.scale_columns) for layout, _ in sizes}) > 1:
        return False
    return _shape(sizes, min(_job_tokens(M, experts), M), lists, shared_limit(device)).slots > 0


def _fill(
    args: _Args,
    product: Product,
    shape: "_Shape",
    token_rows: int,
    M: int,
    active: int,
    experts: int,
    ids: Tensor | None,
    weights: Tensor | None,
    parts: Tensor | None,
    arrived: Tensor | None,
) -> None:
    operand, layout, x, out = product.operand, product.operand.layout, product.x, product.out
    assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] == layout.K and x.data_ptr() % 16 == 0
    assert out.is_contiguous() and out.data_ptr() % 16 == 0
    values = (
        product.epilogue,
        *(None if t is None else t.data_ptr() for t in (operand.table, operand.data, ids, weights, x, out)), M, active,
        experts, layout.N // 2 if product.epilogue == GATE_UP else layout.N, layout.K, layout.tiles, layout.chunks,
        product.splits, token_rows, shape.slots, FIRST_SLOTS, shape.segment_tiles, shape.sum_rows, shape.x_nbytes,
        shape.nested_room, operand.start, layout.meta_start, layout.nested_start, sum(layout.nested_counts),
        _nested_span(layout), *(None if t is None else t.data_ptr() for t in (parts, arrived)), *_parts(layout),
        *_tables(layout.levels),
    )  # fmt: skip
    for field, value in zip(args._fields_, values, strict=True):
        setattr(args, field[0], value)


@cache
def _structure(phases: int) -> type[ctypes.Structure]:
    """skinny.cu's Launch."""

    class Launch(ctypes.Structure):
        _fields_ = (("of", _Args * phases), ("blocks", ctypes.c_void_p))

    return Launch


@cache
def splits_for(layout: TileLayout, M: int, device: torch.device, active: int = 1, experts: int = 0) -> int:
    """Into how many parts of K to cut the matrix, so that its work divides well and tokens fit into shared memory.

    `active` of `experts` are chosen for each token; 0 for a matrix that takes all. 0 if so many tokens do not fit.
    """
    processors, limit, tokens = multiprocessors(device), shared_limit(device), _job_tokens(M, experts)
    jobs = active if experts else -(-M // tokens)
    units = layout.tiles * jobs
    found: list[tuple[int, float, int]] = []
    most = MAX_SPLITS if experts or units <= COUNT else 1
    for splits in range(1, min(layout.chunks, most) + 1):
        shape = _shape(((layout, splits),), min(tokens, M), _lists_nbytes(M, active, experts), limit)
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
        if splits and _shape(((layout, splits),), min(_job_tokens(M, experts), M), lists, limit).slots:
            return M
    return 0


def _job_tokens(M: int, experts: int) -> int:
    """Most tokens of a job."""
    return TOKENS if experts or M <= TOKENS else 2 * TOKENS


def _lists_nbytes(M: int, active: int, experts: int) -> int:
    """Of the lists of jobs in shared memory."""
    tokens = _job_tokens(M, experts)
    jobs = M * active if experts else -(-M // tokens)
    return 4 * ((tokens + 3) * jobs + (jobs + experts if experts else 0))


Sizes = tuple[tuple[TileLayout, int], ...]  # of a launch's products: the matrix, and into how many parts K is cut


@dataclass(frozen=True)
class _Shape:
    """Of a block: warps, half chunks that each keeps in flight (0: no room), tiles of a segment, and what there is room
    for: sums of 32 rows, bytes of x, second-level scales of 16 rows; bytes of shared memory, and of the table of levels
    from entry to entry."""

    warps: int
    slots: int
    segment_tiles: int
    sum_rows: int
    x_nbytes: int
    nested_room: int
    nbytes: int
    table_stride: int = 256


@cache
def _shape(sizes: Sizes, token_rows: int, lists: int, limit: int) -> _Shape:
    for warps in WARPS:
        for stride, slots, segment in _choices(warps, sizes[0][0]):
            shape = _fitted(warps, slots, segment, stride, sizes, token_rows, lists, limit)
            if shape:
                return shape
    return _Shape(WARPS[-1], 0, 0, 0, 0, 0, 0)


def _choices(warps: int, layout: TileLayout) -> Iterator[tuple[int, int, int]]:
    """Strides of the table, slots and tiles of a segment, the quicker first."""
    most = IN_FLIGHT // warps
    if layout.levels == "nf4":
        yield from ((TABLE_STRIDES[0], most, segment) for segment in SEGMENT_TILES[:2])
    yield from itertools.product(TABLE_STRIDES[1:], range(most, 1, -1), SEGMENT_TILES)


def _fitted(
    warps: int, slots: int, segment: int, stride: int, sizes: Sizes, token_rows: int, other: int, limit: int
) -> _Shape | None:
    """A shape with those sizes if the sums of some tiles find room as well; `other` bytes are needed besides."""
    first = sizes[0][0]
    room = max(_nested_span(layout) for layout, _ in sizes)
    nested = 1024 + segment * (16 + 8 * room) if first.nested else 0
    table = 256 * stride if first.levels == "nf4" else 0
    ring = warps * slots * (first.chunk_nbytes - CODES_NBYTES // 2 + 8)
    x = token_rows * max(-(-layout.chunks // splits) * 2 * COLUMNS + 16 for layout, splits in sizes)
    fixed = table + ring + x + nested + 4 * segment + other
    sum_rows = min((limit - fixed) // _SUMS_NBYTES, (segment + warps) * token_rows)
    least = min(segment, 16 if stride == TABLE_STRIDES[0] else 8) + warps
    if sum_rows < least * token_rows:
        return None
    return _Shape(warps, slots, segment, sum_rows, x, room, fixed + sum_rows * _SUMS_NBYTES, stride)


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
    phases: int, warps: int, scale_kind: int, scale_columns: int, tokens: int = TOKENS, table_stride: int = 256
) -> Kernel:
    macros: dict[str, int | str] = {
        "PHASES": phases, "WARPS": warps, "TOKENS": tokens, "TABLE_STRIDE": table_stride,
        "SCALE_KIND": scale_kind, "SCALE_COLUMNS": scale_columns,
    }  # fmt: skip
    return Kernel("skinny", [Path(__file__).with_name(name) for name in SOURCES], macros)


@cache
def _tables(levels: Levels) -> tuple[Any, ...]:
    """The kernel's levels as bfloat16 bits, the first-level table of double quantization, and what scales take."""
    bits = kernel_levels(levels).bfloat16().view(torch.int16).tolist()
    unscale = 1 / level_scale(levels)
    scaled = (dynamic_map() * unscale).tolist()
    return (ctypes.c_uint16 * 16)(*(b & 0xFFFF for b in bits)), (ctypes.c_float * 256)(*scaled), unscale
