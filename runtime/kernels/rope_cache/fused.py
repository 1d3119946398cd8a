"""The Triton kernels: a program turns one head of one token, or the angles of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _angles_kernel(p_position, p_frequency, p_cos, p_sin, R: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    # In float64: at a million tokens float32 angles are off by up to a sixteenth.
    angle = tl.load(p_position + row).to(tl.float64) * tl.load(p_frequency + o_r, mask=m_r, other=0.0)
    tl.store(p_cos + row * R + o_r, tl.cos(angle).to(tl.float32), mask=m_r)
    tl.store(p_sin + row * R + o_r, tl.sin(angle).to(tl.float32), mask=m_r)


@triton.jit(do_not_specialize=["capacity", "tokens"])  # one compiled kernel for all of them
def _rope_cache_kernel(
    p_in, p_cos, p_sin, p_q, p_k, p_v, p_past, capacity, tokens,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(p_past) + row % tokens
    group = row // tokens * G
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    m_turned = o_k < tl.where(head < H + G, 2 * R, 0)
    m_kept = o_k < tl.where(place < capacity, K, 0)
    p_head = p_in + (row * (H + 2 * G) + head) * K
    x = tl.load(p_head + o_k, mask=m_k, other=0.0)
    other = tl.load(p_head + tl.where(o_k < R, o_k + R, o_k - R), mask=m_turned, other=0.0).to(tl.float32)
    o_angle = row * R + tl.where(o_k < R, o_k, o_k - R)
    cos = tl.load(p_cos + o_angle, mask=m_turned, other=1.0)
    sin = tl.load(p_sin + o_angle, mask=m_turned, other=0.0)
    turned = x.to(tl.float32) * cos + tl.where(o_k < R, -other, other) * sin
    y = tl.where(m_turned, turned, x.to(tl.float32)).to(p_q.dtype.element_ty)
    if head < H:
        tl.store(p_q + (row * H + head) * K + o_k, y, mask=m_k)
    elif head < H + G:
        tl.store(p_k + ((group + head - H) * capacity + place) * K + o_k, y, mask=m_kept)
    else:
        tl.store(p_v + ((group + head - H - G) * capacity + place) * K + o_k, y, mask=m_kept)


def angles(positions: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.angles`."""
    R = frequencies_R.shape[0]
    cos, sin = torch.empty(2, *positions.shape, R, dtype=torch.float32, device=positions.device)
    with torch.cuda.device_of(positions):  # Triton launches on the current device
        _angles_kernel[(positions.numel(),)](
            positions, frequencies_R, cos, sin, R=R, BLOCK_R=triton.next_power_of_2(max(R, 1)), num_warps=1
        )
    return cos, sin


def rope_cache(
    p_BTP: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor, q_BTHK: Tensor
) -> None:
    """As `reference.rope_cache`; places beyond the caches are not written."""
    (B, T, H, K), (G, L) = q_BTHK.shape, k_BGLK.shape[1:3]
    assert p_BTP.is_contiguous() and cos_BTR.is_contiguous() and sin_BTR.is_contiguous()
    with torch.cuda.device_of(p_BTP):
        _rope_cache_kernel[(B * T, H + 2 * G)](
            p_BTP, cos_BTR, sin_BTR, q_BTHK, k_BGLK, v_BGLK, past, L, T,
            H=H, G=G, K=K, R=cos_BTR.shape[2], BLOCK_K=triton.next_power_of_2(K), num_warps=1,
        )  # fmt: skip
