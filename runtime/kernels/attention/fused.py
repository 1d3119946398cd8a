"""Decode attention in Triton: the cache is split among programs, whose partial softmaxes a second launch merges.

How many programs there are hangs on the batch and the GPU alone; what each reads, on the length it finds on the
device. So one captured launch serves any length, and at batch 1 a long context still occupies every multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.device import multiprocessors

BLOCK_L = 64  # places of the cache a program reads at a time
PROGRAMS_PER_SM = 2  # with three stages of keys and values in flight, two of them fit on a multiprocessor
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e30)  # the largest score where nothing was seen; finite, so that differences are


@triton.jit(do_not_specialize=["capacity", "splits"])  # one compiled kernel for all capacities and batches
def _split_kernel(
    p_q, p_k, p_v, p_valid, p_past, p_out, p_stats, capacity, splits, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    group = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    past = tl.load(p_past)
    per_split = tl.cdiv(tl.cdiv(past + 1, BLOCK_L), splits) * BLOCK_L
    begin = split * per_split
    end = tl.minimum(begin + per_split, past + 1)
    if begin > past:
        return
    o_r, o_k, o_l = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_L)
    head = row * H + group * (H // G) + o_r
    m_rk = (o_r < H // G)[:, None] & (o_k < K)[None, :]
    q = tl.load(p_q + head[:, None] * K + o_k[None, :], mask=m_rk, other=0.0)
    cache = (row * G + group) * capacity
    top = tl.full((BLOCK_R,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    out = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_L):
        place = start + o_l
        o_lk = (cache + place)[:, None] * K + o_k[None, :]
        m_lk = (place < end)[:, None] & (o_k < K)[None, :]
        k = tl.load(p_k + o_lk, mask=m_lk, other=0.0)
        seen = place < end
        if MASKED:
            real = tl.load(p_valid + row * capacity + place, mask=seen, other=0)
            seen = seen & ((real != 0) | (place == past))
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = tl.load(p_v + o_lk, mask=m_lk, other=0.0)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weight, axis=1)
        top = higher
    if WHOLE:
        out = out / total[:, None]
        tl.store(p_out + head[:, None] * K + o_k[None, :], out.to(p_out.dtype.element_ty), mask=m_rk)
    else:
        part = head * splits + split
        tl.store(p_out + part[:, None] * K + o_k[None, :], out, mask=m_rk)
        tl.store(p_stats + 2 * part, top, mask=o_r < H // G)
        tl.store(p_stats + 2 * part + 1, total, mask=o_r < H // G)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    p_parts, p_stats, p_past, p_out, splits,
    K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    o_s, o_k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(tl.load(p_past) + 1, BLOCK_L)
    m_s = o_s < tl.cdiv(blocks, tl.cdiv(blocks, splits))  # those that had anything to read
    part = head * splits + o_s
    top = tl.load(p_stats + 2 * part, mask=m_s, other=NOTHING)
    share = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(share * tl.load(p_stats + 2 * part + 1, mask=m_s, other=0.0), axis=0)
    m_sk = m_s[:, None] & (o_k < K)[None, :]
    parts = tl.load(p_parts + part[:, None] * K + o_k[None, :], mask=m_sk, other=0.0)
    out = tl.sum(parts * share[:, None], axis=0) / total
    tl.store(p_out + head * K + o_k, out.to(p_out.dtype.element_ty), mask=o_k < K)


def splits(batch: int, groups: int, capacity: int, device: torch.device) -> int:
    """Among how many programs the cache of a key-value head is split."""
    processors = multiprocessors(device) if device.type == "cuda" else 4  # Triton's interpreter runs on CPU tensors
    wanted = -(-PROGRAMS_PER_SM * processors // (batch * groups))
    return max(1, min(wanted, -(-capacity // BLOCK_L)))


def decode(q_BHK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor, valid_BL: Tensor | None) -> Tensor:
    """Outputs [B, H, K] in the dtype of q; see the package."""
    (B, H, K), (G, L) = q_BHK.shape, k_BGLK.shape[1:3]
    assert q_BHK.is_contiguous() and k_BGLK.is_contiguous() and v_BGLK.is_contiguous()
    assert valid_BL is None or (valid_BL.is_contiguous() and valid_BL.shape == (B, L))
    S = splits(B, G, L, q_BHK.device)
    out_BHK = torch.empty_like(q_BHK)
    parts = q_BHK.new_empty(B, H, S, K, dtype=torch.float32) if S > 1 else out_BHK
    stats = q_BHK.new_empty(B, H, S, 2, dtype=torch.float32) if S > 1 else out_BHK
    valid = q_BHK if valid_BL is None else valid_BL.view(torch.uint8)
    BLOCK_K = triton.next_power_of_2(max(K, 16))
    with torch.cuda.device_of(q_BHK):  # Triton launches on the current device
        _split_kernel[(S, G, B)](
            q_BHK, k_BGLK, v_BGLK, valid, past, parts, stats, L, S, K**-0.5,
            H=H, G=G, K=K, WHOLE=S == 1, MASKED=valid_BL is not None,
            BLOCK_R=triton.next_power_of_2(max(H // G, 16)), BLOCK_L=BLOCK_L, BLOCK_K=BLOCK_K,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        if S > 1:
            _merge_kernel[(B * H,)](
                parts, stats, past, out_BHK, S,
                K=K, BLOCK_L=BLOCK_L, BLOCK_S=triton.next_power_of_2(S), BLOCK_K=BLOCK_K, num_warps=4,
            )  # fmt: skip
    return out_BHK
