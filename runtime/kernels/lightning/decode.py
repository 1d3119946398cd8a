"""One token of every sequence in one launch, from the projections to the gated output.

A program takes some columns of a head's state, reads and writes them once, and leaves its part of o, weighted and
gated, and of the sum of squares. The norm spans all heads, so the last program of a sequence scales what all left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.counters import counters
from minibble.runtime.kernels.lightning.activations import sigmoid, silu
from minibble.runtime.kernels.overlap import launch_options, wait

# Columns of a head's state in a program and its warps: for one sequence's 64 heads, where all programs run at once and
# latency counts, 6.7 us against 7.7; for four sequences 18.0 against 16.6 (H100).
FEW, MANY = (16, 8), (64, 4)
FEW_HEADS = 64  # of all sequences


@triton.jit
def _decode_kernel(
    p_x, p_slope, p_state, p_norm, p_count, p_part, p_square, p_out, eps,
    H: tl.constexpr, K: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_HK: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    h = program // SLICES
    o_k = tl.arange(0, BLOCK_K)
    o_v = program % SLICES * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < K, o_v < K
    m_state = m_k[:, None] & m_v[None, :]
    p_s = p_state + (b * H + h) * K * K + o_k[:, None] * K + o_v[None, :]
    wait(OVERLAP)
    state = tl.load(p_s, mask=m_state, other=0.0)
    decay = tl.exp(-tl.load(p_slope + h))
    p_head = p_x + b * 4 * H * K + h * 3 * K
    q = silu(tl.load(p_head + o_k, mask=m_k, other=0.0).to(tl.float32), EXACT)
    k = silu(tl.load(p_head + K + o_k, mask=m_k, other=0.0).to(tl.float32), EXACT)
    v = silu(tl.load(p_head + 2 * K + o_v, mask=m_v, other=0.0).to(tl.float32), EXACT)
    feature = h * K + o_v
    gate = tl.load(p_x + b * 4 * H * K + 3 * H * K + feature, mask=m_v, other=0.0).to(tl.float32)
    norm = tl.load(p_norm + feature, mask=m_v, other=0.0)

    state = state * decay + k[:, None] * v[None, :]
    o = tl.sum(q[:, None] * state, axis=0)
    tl.store(p_part + b * H * K + feature, o * norm * sigmoid(gate, EXACT), mask=m_v)
    tl.store(p_square + b * H * SLICES + program, tl.sum(o * o, axis=0))
    tl.debug_barrier()  # every thread's part is stored before one of them says so
    done = tl.atomic_add(p_count + b, 1, sem="acq_rel", scope="gpu")
    # Only now: the last program needs none of it, and need not wait for it.
    tl.store(p_s, state, mask=m_state)

    if done == H * SLICES - 1:
        o_p = tl.arange(0, BLOCK_P)
        square = tl.load(p_square + b * H * SLICES + o_p, mask=o_p < H * SLICES, other=0.0, cache_modifier=".cg")
        scale = tl.rsqrt(tl.sum(square, axis=0) / (H * K) + eps)
        o_f = tl.arange(0, BLOCK_HK)
        part = tl.load(p_part + b * H * K + o_f, mask=o_f < H * K, other=0.0, cache_modifier=".cg")
        tl.store(p_out + b * H * K + o_f, (part * scale).to(p_out.dtype.element_ty), mask=o_f < H * K)
        tl.store(p_count + b, 0)


def decode(projected_BP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, eps: float) -> Tensor:
    """Gated output [B, HK] in the dtype of `projected_BP`; `state_BHKK`, float32, is updated in place."""
    B, H, K, _ = state_BHKK.shape
    assert projected_BP.shape == (B, 4 * H * K) and projected_BP.is_contiguous() and state_BHKK.is_contiguous()
    columns, warps = FEW if B * H <= FEW_HEADS else MANY
    block_v = min(columns, triton.next_power_of_2(K))
    slices = triton.cdiv(K, block_v)
    count = counters(projected_BP.device)
    assert len(count) >= B
    part_BN = torch.empty(B, H * K, device=projected_BP.device)
    square_BP = torch.empty(B, H * slices, device=projected_BP.device)
    out_BN = torch.empty(B, H * K, dtype=projected_BP.dtype, device=projected_BP.device)
    with torch.cuda.device_of(projected_BP):  # Triton launches on the current device
        _decode_kernel[(H * slices, B)](
            projected_BP, slope_H, state_BHKK, norm_HK, count, part_BN, square_BP, out_BN, eps,
            H=H, K=K, SLICES=slices, BLOCK_K=triton.next_power_of_2(K), BLOCK_V=block_v,
            BLOCK_HK=triton.next_power_of_2(H * K), BLOCK_P=triton.next_power_of_2(H * slices),
            EXACT=not projected_BP.is_cuda, num_warps=warps, **launch_options(projected_BP.device),
        )  # fmt: skip
    return out_BN
