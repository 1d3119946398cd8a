"""Logits and choice for few tokens in one launch.

A program multiplies a stretch of a few experts' weights with some tokens and leaves its share of their logits; the
last one for those tokens adds the shares up, always in the same order, and chooses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.counters import counters
from minibble.runtime.kernels.overlap import launch_options, wait

TOKENS = 8  # in a program at most
STRETCH = 2048  # of the hidden size in a program: 96 programs for 32 experts of 6144
WARPS = 4


@triton.jit(do_not_specialize=["M"])  # one compilation for all
def _route_kernel(
    p_y, p_weight, p_count, p_share, p_ids, p_weights, M,
    D: tl.constexpr, E: tl.constexpr, A: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    e, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < M, o_d < D
    wait(OVERLAP)
    weight = tl.load(p_weight + e * D + o_d, mask=m_d, other=0.0)
    m_y = m_m[:, None] & m_d[None, :]
    y = tl.load(p_y + o_m[:, None] * D + o_d[None, :], mask=m_y, other=0.0).to(tl.float32)
    share = tl.sum(y * weight[None, :], axis=1)
    tl.store(p_share + (part * M + o_m) * E + e, share, mask=m_m)
    tl.debug_barrier()  # every thread's share is stored before one of them says so
    done = tl.atomic_add(p_count + tile, 1, sem="acq_rel", scope="gpu")

    if done == E * PARTS - 1:
        o_e = tl.arange(0, BLOCK_E)
        m_e = o_e < E
        o_a = tl.arange(0, BLOCK_A)
        logits = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
        for i in tl.static_range(PARTS):
            p = p_share + (i * M + o_m[:, None]) * E + o_e[None, :]
            logits += tl.load(p, mask=m_m[:, None] & m_e[None, :], other=0.0, cache_modifier=".cg")
        free = tl.broadcast_to(m_e[None, :], (BLOCK_M, BLOCK_E))
        best = tl.max(tl.where(free, logits, float("-inf")), axis=1)
        ids = tl.zeros((BLOCK_M, BLOCK_A), dtype=tl.int32)
        exps = tl.zeros((BLOCK_M, BLOCK_A), dtype=tl.float32)
        for a in tl.static_range(A):
            largest = tl.max(tl.where(free, logits, float("-inf")), axis=1)
            # Without an equal, among NaN, still an expert: an id beyond them would be an address beyond the table.
            at = free & (logits == largest[:, None])
            chosen = tl.minimum(tl.min(tl.where(at, o_e[None, :], E), axis=1), E - 1)
            free = free & (o_e[None, :] != chosen[:, None])
            ids = tl.where(o_a[None, :] == a, chosen[:, None], ids)
            exps = tl.where(o_a[None, :] == a, tl.exp(largest - best)[:, None], exps)
        m_a = m_m[:, None] & (o_a < A)[None, :]
        p = o_m[:, None] * A + o_a[None, :]
        tl.store(p_ids + p, ids, mask=m_a)
        tl.store(p_weights + p, exps / tl.sum(exps, axis=1)[:, None], mask=m_a)
        tl.store(p_count + tile, 0)


def route(y_MD: Tensor, weight_ED: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """See `minibble.runtime.kernels.router.route`."""
    M, D = y_MD.shape
    E = weight_ED.shape[0]
    assert y_MD.is_contiguous() and weight_ED.is_contiguous()
    block_m, block_d = min(TOKENS, triton.next_power_of_2(M)), min(STRETCH, triton.next_power_of_2(D))
    parts, tiles = triton.cdiv(D, block_d), triton.cdiv(M, block_m)
    count = counters(y_MD.device)
    assert len(count) >= tiles
    share_PME = torch.empty(parts, M, E, device=y_MD.device)
    ids_MA = torch.empty(M, active, dtype=torch.int32, device=y_MD.device)
    weights_MA = torch.empty(M, active, device=y_MD.device)
    with torch.cuda.device_of(y_MD):  # Triton launches on the current device
        _route_kernel[(E, parts, tiles)](
            y_MD, weight_ED, count, share_PME, ids_MA, weights_MA, M,
            D=D, E=E, A=active, PARTS=parts, BLOCK_M=block_m, BLOCK_D=block_d,
            BLOCK_E=triton.next_power_of_2(E), BLOCK_A=triton.next_power_of_2(active), num_warps=WARPS,
            **launch_options(y_MD.device),
        )  # fmt: skip
    return ids_MA, weights_MA
