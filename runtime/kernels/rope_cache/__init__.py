"""Partial rotary embedding of one token per sequence, its keys and values appended to the cache, in one launch.

Array axes: B batch, P what `in_proj` gives: H query, G key and G value heads of K features; L places of the cache;
R rotated pairs, feature i with i + R. Where to append is read on the device, so a captured launch serves every token.
"""

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.rope_cache import reference


def angles(positions_B: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of int64 positions [B] times float64 frequencies [R]: float32 [B, R], exact at a million tokens."""
    if not positions_B.is_cuda or reference_forced():
        return reference.angles(positions_B, frequencies_R)
    from minibble.runtime.kernels.rope_cache import fused

    return fused.angles(positions_B, frequencies_R)


def rope_cache(p_BP: Tensor, cos_BR: Tensor, sin_BR: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor) -> Tensor:
    """The rotated queries [B, H, K]; keys and values go to place `past` (int32 [1], on the device) of the caches.

    `cos_BR`, `sin_BR` come from `angles`. A place beyond the caches is not written.
    """
    B, P = p_BP.shape
    G, K = k_BGLK.shape[1], k_BGLK.shape[3]
    assert k_BGLK.shape == v_BGLK.shape and k_BGLK.is_contiguous() and v_BGLK.is_contiguous()
    assert P % K == 0 and P // K > 2 * G and p_BP.is_contiguous() and k_BGLK.shape[0] == B == cos_BR.shape[0]
    q_BHK = torch.empty(B, P // K - 2 * G, K, dtype=p_BP.dtype, device=p_BP.device)
    if p_BP.is_cuda and not reference_forced():
        from minibble.runtime.kernels.rope_cache import fused

        fused.rope_cache(p_BP, cos_BR, sin_BR, k_BGLK, v_BGLK, past, q_BHK)
    else:
        reference.rope_cache(p_BP, cos_BR, sin_BR, k_BGLK, v_BGLK, past, q_BHK)
    return q_BHK
