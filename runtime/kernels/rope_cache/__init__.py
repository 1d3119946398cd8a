"""Partial rotary embedding of new tokens, their keys and values appended to the cache, in one launch.

Array axes: B batch, T new tokens, P what `in_proj` gives: H query, G key and G value heads of K features; L places of
the cache; R rotated pairs, feature i with i + R. Where to append is read on the device, so that a captured launch
serves every token.
"""

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.rope_cache import reference


def angles(positions: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of int64 positions times float64 frequencies [R]: float32 [..., R], exact at a million tokens."""
    if not positions.is_cuda or reference_forced():
        return reference.angles(positions, frequencies_R)
    from minibble.runtime.kernels.rope_cache import fused

    return fused.angles(positions.contiguous(), frequencies_R)


def rope_cache(p_BTP: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor) -> Tensor:
    """The rotated queries [B, T, H, K]; keys and values go into the caches, from place `past` on.

    `cos_BTR`, `sin_BTR` come from `angles`; `past` is int32 [1], on the device. Places beyond the caches must not be
    needed; the kernel does not write them.
    """
    (B, T, P), (G, K) = p_BTP.shape, k_BGLK.shape[1::2]
    assert k_BGLK.shape == v_BGLK.shape and k_BGLK.is_contiguous() and v_BGLK.is_contiguous()
    assert P % K == 0 and P // K > 2 * G and k_BGLK.shape[0] == B and cos_BTR.shape[:2] == (B, T)
    q_BTHK = torch.empty(B, T, P // K - 2 * G, K, dtype=p_BTP.dtype, device=p_BTP.device)
    if p_BTP.is_cuda and not reference_forced():
        from minibble.runtime.kernels.rope_cache import fused

        fused.rope_cache(p_BTP.contiguous(), cos_BTR, sin_BTR, k_BGLK, v_BGLK, past, q_BTHK)
    else:
        reference.rope_cache(p_BTP, cos_BTR, sin_BTR, k_BGLK, v_BGLK, past, q_BTHK)
    return q_BTHK
