"""Products of many tokens with 4-bit matrices in the kernel layout, on Hopper's tensor cores. Axes: M tokens, N rows, K
columns; E experts, A active, P = M*A pairs, D hidden, F expert hidden.

Nothing here waits for the GPU, and everything may be captured in CUDA graphs. Weights and addresses are read before the
kernel ahead has ended: they must not be what it writes.
"""

import ctypes
from functools import cache, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.nf4_math import dynamic_map
from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.counters import Held, of_stream
from minibble.runtime.kernels.device import multiprocessors
from minibble.runtime.kernels.tiles import HALF_SCALE, ROWS, TileLayout, byte_levels, level_scale

_HERE = Path(__file__).parent
_SOURCES = tuple(
    _HERE / name
    for name in (
        "ptx.cuh",
        "wgmma.cuh",
        "tile_shape.cuh",
        "table_entry.cuh",
        "tile_plan.cuh",
        "tile_scales.cuh",
        "tile_store.cuh",
        "tile.cu",
    )
)
_FLAGS = ("NF4", "NESTED", "GROUPED", "SILU", "SCATTERED", "SCALED", "OUT_FLOAT")  # macros, see tile.cu
_SHARED_NBYTES = 232448
# Of a tile; one of 256 is made by two blocks together. 1024 tokens, 6144 -> 9216 on an H100: 167 us in tiles of 256,
# 192 in tiles of 128.
TOKENS = (16, 32, 64, 128, 256)
_WIDE = 256
_ROWS = {16: 256, 32: 256, 64: 192, 128: 128, 256: 256}  # of W in such a tile
_PARTIALS = 256 * 128  # sums of a block's share of a tile, at most
MAX_EXPERTS = 256
_BAND = 2048  # tokens that share a pass over the weights: 25 MB of x at K = 6144, half of the L2 cache


class _TensorMap(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint64 * 16),)


class _Problem(ctypes.Structure):
    """Of tile.cu, in its order."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("out", "matrices", "matrix_start", "meta_start", "nested_start")),
        *((name, ctypes.c_uint64) for name in ("offsets", "rows", "factors", "table", "dynamic_map")),
        *((name, ctypes.c_uint64) for name in ("partials", "flags")),
        ("inverse", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in ("experts", "tokens", "N", "K", "tiles", "chunks", "chunk_nbytes", "band")
        ),
    )


def available(device: torch.device) -> bool:
    """True where the tensor cores' kernel runs."""
    return device.type == "cuda" and nvrtc.available() and nvrtc.is_hopper(device)


def linear(
    x_MK: Tensor,
    data: Tensor,
    layout: TileLayout,
    out_dtype: torch.dtype = torch.bfloat16,
    tokens: int | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """x W^T, bfloat16 or float32 [M, N], from x bfloat16 [M, K] and W in `layout`, uint8 [layout.nbytes].

    Each row is multiplied by its one of `factors`, float32 [M].
    """
    M, K = x_MK.shape
    assert K == layout.K and x_MK.dtype == torch.bfloat16 and data.numel() >= layout.nbytes
    assert factors is None or (factors.shape == (M,) and factors.dtype == torch.float32 and factors.is_contiguous())
    out = torch.empty(M, layout.N, dtype=out_dtype, device=x_MK.device)
    if not M:
        return out
    tokens = tokens or tile_tokens(M)
    units = -(-M // tokens) * -(-layout.tiles * ROWS // _ROWS[tokens]) * layout.chunks * 4
    _launch(
        _kernel(layout, tokens, out_dtype == torch.float32, scaled=factors is not None),
        _aligned(x_MK),
        out,
        layout,
        tokens,
        matrices=data,
        most=-(-units // 4),
        factors=0 if factors is None else factors.data_ptr(),
    )
    return out


def experts(
    x_MD: Tensor,
    ids_MA: Tensor,
    weights_MA: Tensor,
    records_E: Tensor,
    gate_up: TileLayout,
    down: TileLayout,
    down_start: int,
) -> Tensor:
    """The routed experts of x, bfloat16 [M, D]: of each token's experts weight * down(silu(gate x) * up x), bfloat16
    [A, M, D].

    `records_E`, int64, are the addresses of the experts' records: gate and up, interleaved, then `down_start` bytes on
    down. `ids_MA` are integers, `weights_MA` float32. Products are of float16, so that the error of two in a row stays
    under 3e-3; weights must be smaller than 1,000.
    """
    from minibble.runtime.kernels.linear4.halves import half_rows

    M, A = ids_MA.shape
    D, F = down.N, gate_up.N // 2
    assert gate_up.interleaved and x_MD.shape == (M, gate_up.K) and down.K == F and weights_MA.dtype == torch.float32
    assert len(records_E) <= MAX_EXPERTS
    if not M:
        return torch.empty(A, M, D, dtype=torch.bfloat16, device=x_MD.device)
    pairs, offsets = sort_pairs(ids_MA, len(records_E))
    h_PF = grouped(*half_rows(x_MD, pairs // A), records_E, gate_up, offsets, silu=True)
    h_PF, factors = half_rows(h_PF, weights=weights_MA.reshape(-1)[pairs])
    rows = pairs % A * M + pairs // A
    return grouped(h_PF, factors, records_E, down, offsets, start=down_start, rows=rows).view(A, M, D)


def sort_pairs(ids_MA: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs m * A + a in the order of their experts, int64 [P], and where each expert's begin, int32 [experts + 1]."""
    sorted_ids, pairs = ids_MA.reshape(-1).sort(stable=True)
    edges = torch.arange(experts + 1, dtype=sorted_ids.dtype, device=sorted_ids.device)
    return pairs, torch.searchsorted(sorted_ids, edges, out_int32=True)


def grouped(
    x_PK: Tensor,
    factors: Tensor,
    records_E: Tensor,
    layout: TileLayout,
    offsets: Tensor,
    start: int = 0,
    silu: bool = False,
    rows: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tokens: int | None = None,
) -> Tensor:
    """Each expert's matrix, `start` bytes after its address, times its rows of x: offsets[e] .. offsets[e + 1].

    `x_PK`, float16, and `factors`, float32 [P], are as `half_rows` makes them. Returns [P, N]; with `silu` [P, N / 2],
    silu(gate) * up of interleaved rows. With `rows`, int64 [P], row i of x makes row rows[i] of the result.
    """
    assert x_PK.dtype == torch.float16 and factors.dtype == torch.float32
    P = len(x_PK)
    N = layout.N // 2 if silu else layout.N
    out = torch.empty(P, N, dtype=out_dtype, device=x_PK.device)
    tokens = tokens or tile_tokens(-(-P // len(records_E)))
    _launch(
        _kernel(
            layout, tokens, out_dtype == torch.float32, scaled=True, grouped=True, silu=silu, scattered=rows is not None
        ),
        _aligned(x_PK),
        out,
        layout,
        tokens,
        matrices=records_E,
        matrix_start=start,
        offsets=offsets.data_ptr(),
        experts=len(records_E),
        rows=0 if rows is None else rows.data_ptr(),
        factors=factors.data_ptr(),
    )
    return out


def tile_tokens(M: int) -> int:
    """Tokens of a tile for M of them."""
    return next((tokens for tokens in TOKENS if tokens >= M), TOKENS[-1])


def _launch(
    kernel: nvrtc.Kernel,
    x: Tensor,
    out: Tensor,
    layout: TileLayout,
    tokens: int,
    matrices: Tensor,
    most: int | None = None,
    **more: int,
) -> None:
    """Launch on the device of x, at `most` so many clusters. The last axis of `out` is what the kernel calls N."""
    device = x.device
    cluster = 2 if tokens == _WIDE else 1
    clusters = multiprocessors(device) // cluster
    partials, flags = _workspace(device)
    problem = _Problem(
        out=out.data_ptr(),
        matrices=matrices.data_ptr(),
        meta_start=layout.meta_start,
        nested_start=layout.nested_start,
        table=_table(layout.levels, device, x.dtype).data_ptr(),
        dynamic_map=dynamic_map(device).data_ptr(),
        partials=partials.data_ptr(),
        flags=flags.data_ptr(),
        inverse=(HALF_SCALE if x.dtype == torch.float16 else 1.0) / level_scale(layout.levels, x.dtype),
        tokens=len(x),
        N=out.shape[1],
        K=layout.K,
        tiles=layout.tiles,
        chunks=layout.chunks,
        chunk_nbytes=layout.chunk_nbytes,
        band=_BAND // tokens,
        **more,
    )
    with torch.cuda.device(device):
        x_map = _tensor_map(x.data_ptr(), *x.shape, 64 if tokens == _WIDE else tokens)
        grid = cluster * min(clusters, most or clusters)
        threads = (
            128 + 2 * _ROWS[tokens] // cluster
        )  # of a block: a warp for each 16 rows, and four that copy and decode
        kernel.launch(grid, threads, [x_map, problem], _SHARED_NBYTES, overlap=True, cluster=cluster)


@cache
def _kernel(
    layout: TileLayout,
    tokens: int,
    out_float: bool,
    scaled: bool,
    grouped: bool = False,
    silu: bool = False,
    scattered: bool = False,
) -> nvrtc.Kernel:
    wanted = (layout.levels == "nf4", layout.nested, grouped, silu, scattered, scaled, out_float)
    return _compiled(frozenset(compress(_FLAGS, wanted)), layout.scale_columns, tokens)


@cache
def _compiled(flags: frozenset[str], columns: int, tokens: int) -> nvrtc.Kernel:
    macros = {name: int(name in flags) for name in _FLAGS} | {"SCALE_COLUMNS": columns, "TOKENS": tokens}
    return nvrtc.Kernel("tile4", _SOURCES, dict(macros))


def _aligned(x: Tensor) -> Tensor:
    """`x` as the copy engine reads it: rows one after the other, from an address that is a multiple of 16."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@lru_cache(1024)
def _tensor_map(address: int, rows: int, columns: int, box: int) -> _TensorMap:
    """Of 16-bit numbers [rows, columns] in boxes of `box` x 64, swizzled by 128 bytes; zeros beyond its edges."""
    from cuda.bindings import driver

    status, made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(2 * columns)],
        [driver.cuuint32_t(64), driver.cuuint32_t(box)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status):
        raise nvrtc.KernelError(f"tensor map of [{rows}, {columns}] at {address:#x}: {status.name}")
    return _TensorMap.from_buffer_copy(ctypes.string_at(int(made.getPtr()), ctypes.sizeof(_TensorMap)))


@cache
def _table(levels: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    return byte_levels(levels, device, dtype).contiguous()


_workspaces: Held[tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the sums that blocks hand over, and their flags, 0 between launches; of the current stream."""
    return of_stream(_workspaces, device, lambda: _new_workspace(device))


def _new_workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    blocks = multiprocessors(device)
    partials = torch.empty(blocks * _PARTIALS, dtype=torch.float32, device=device)
    return partials, torch.zeros(4 * blocks, dtype=torch.int32, device=device)
