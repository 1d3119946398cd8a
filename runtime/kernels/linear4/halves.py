"""Rows of activations as float16 for the tensor cores, on CUDA in one launch. Axes: M tokens, P rows made, K columns.

float16 has three bits more than bfloat16 and a far smaller range, so each row is brought into it by a power of two.
"""

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.overlap import launch_options, wait
from minibble.runtime.kernels.tiles import HALF_SCALE

# Float32's exponents, 127 more than those of 2. A row's largest number gets 2^14; numbers that are smaller by 2^28 lose
# bits, by 2^39 are 0.
_LARGEST = 127 + 14
_LEAST = tl.constexpr(32)  # of a row's largest number: from 2^-95 on
_UP = tl.constexpr(127 + _LARGEST)
_DOWN = tl.constexpr(_LARGEST - 127 + int(log2(HALF_SCALE)))


@triton.jit
def _half_kernel(
    p_x, p_rows, p_weights, p_out, p_factors,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    wait(OVERLAP)
    row = tl.load(p_rows + i) if CHOSEN else i
    x = tl.load(p_x + row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, _LEAST)
    up = ((-exponent + _UP) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - _DOWN) << 23).to(tl.float32, bitcast=True)
    if WEIGHTED:
        down *= tl.load(p_weights + i)
    tl.store(p_out + i * K + o_k, (x * up).to(tl.float16), mask=m_k)
    tl.store(p_factors + i, down)


def half_rows(x_MK: Tensor, rows: Tensor | None = None, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float16 [P, K] and float32 [P]: the rows `rows` of x (int64 [P], all by default), each times a power of two, and
    what undoes that in products with weights that are HALF_SCALE times too large, times `weights`, float32 [P].

    x is bfloat16 [M, K]; all rows are made in its place. A row with infinity or NaN keeps it.
    """
    assert x_MK.is_contiguous() and all(v is None or v.is_contiguous() for v in (rows, weights))
    P, K = len(x_MK) if rows is None else len(rows), x_MK.shape[1]
    out = x_MK.view(torch.float16) if rows is None else torch.empty(P, K, dtype=torch.float16, device=x_MK.device)
    factors = torch.empty(P, dtype=torch.float32, device=x_MK.device)
    if P == 0:
        return out, factors
    block_k = triton.next_power_of_2(K)
    with torch.cuda.device_of(x_MK):  # Triton launches on the current device
        _half_kernel[(P,)](
            x_MK, x_MK if rows is None else rows, x_MK if weights is None else weights, out, factors,
            K=K, BLOCK_K=block_k, CHOSEN=rows is not None, WEIGHTED=weights is not None,
            num_warps=min(8, max(1, block_k // 512)), **launch_options(x_MK.device),
        )  # fmt: skip
    return out, factors
