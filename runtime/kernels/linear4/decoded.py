"""Matrices in the kernel layout decoded to bfloat16, on any GPU, and products by cuBLAS with slices of them. Axes: M
tokens, N rows, K columns.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibble.quantize.nf4_math import dynamic_map, level_table
from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.tiles import ROWS, TileLayout

_CHUNKS_A_BLOCK = 4
_BLOCK_ROWS = 256  # a slice is whole blocks of rows
# Of decoded weights at a time. 6144 -> 9216, 1024 tokens on an H100: 298 us in slices of 16 MiB, 224 of 32, 212 whole.
SLICE_NBYTES = 128 << 20


class _Source(ctypes.Structure):
    """Of decode_tiles.cu, in its order."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("matrix", "meta_start", "nested_start", "levels", "dynamic_map")),
        *((name, ctypes.c_int32) for name in ("chunks", "chunk_nbytes", "K")),
    )


def decode_tiles(
    data: Tensor, layout: TileLayout, rows: tuple[int, int] | None = None, out: Tensor | None = None
) -> Tensor:
    """Rows [first, end) of W, all by default, bfloat16 [end - first, K]; `first` is a multiple of 32.

    Rows are in the order of the layout: where two matrices are interleaved, they alternate by 16.
    """
    first, end = rows or (0, layout.N)
    assert first % ROWS == 0 and first < end <= layout.N
    out = torch.empty(end - first, layout.K, dtype=torch.bfloat16, device=data.device) if out is None else out
    source = _Source(
        data.data_ptr(),
        layout.meta_start,
        layout.nested_start,
        level_table(layout.levels, data.device).data_ptr(),
        dynamic_map(data.device).data_ptr(),
        layout.chunks,
        layout.chunk_nbytes,
        layout.K,
    )
    with torch.cuda.device(data.device):
        grid = (-(-layout.chunks // _CHUNKS_A_BLOCK), -(-(end - first) // ROWS), 1)
        _decode_kernel(layout.levels == "nf4", layout.nested, layout.scale_columns).launch(
            grid, 128, [source, out, first, end]
        )
    return out


def linear_decoded(
    x_MK: Tensor,
    data: Tensor,
    layout: TileLayout,
    out_dtype: torch.dtype = torch.bfloat16,
    slice_nbytes: int = SLICE_NBYTES,
) -> Tensor:
    """As `linear`, on any GPU: slices of rows are decoded to bfloat16 and multiplied by cuBLAS."""
    step = max(slice_nbytes // (2 * layout.K) // _BLOCK_ROWS, 1) * _BLOCK_ROWS
    step = min(step, -(-layout.N // ROWS) * ROWS)
    out = torch.empty(len(x_MK), layout.N, dtype=out_dtype, device=x_MK.device)
    workspace = torch.empty(step, layout.K, dtype=torch.bfloat16, device=x_MK.device)
    for first in range(0, layout.N, step):
        end = min(first + step, layout.N)
        weight = decode_tiles(data, layout, (first, end), workspace[: end - first])
        if out_dtype == torch.bfloat16:
            torch.mm(x_MK, weight.t(), out=out[:, first:end])
        else:
            out[:, first:end] = torch.mm(x_MK, weight.t(), out_dtype=out_dtype)
    return out


@cache
def _decode_kernel(nf4: bool, nested: bool, columns: int) -> nvrtc.Kernel:
    macros: dict[str, int | str] = {"NF4": int(nf4), "NESTED": int(nested), "SCALE_COLUMNS": columns}
    return nvrtc.Kernel("decode_tiles", (Path(__file__).with_name("decode_tiles.cu"),), macros)
