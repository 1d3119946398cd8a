"""Rotary embedding of one token per sequence and its place in the cache, in plain torch."""

import torch
from torch import Tensor


def angles(positions_B: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, in float64, rounded to float32 [B, R]."""
    angle = positions_B.double()[:, None] * frequencies_R
    return angle.cos().float(), angle.sin().float()


def rope_cache(
    p_BP: Tensor, cos_BR: Tensor, sin_BR: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor, q_BHK: Tensor
) -> None:
    """Write rotated queries into `q_BHK`, rotated keys and values into the caches at the index `past`."""
    H, G = q_BHK.shape[1], k_BGLK.shape[1]
    heads = p_BP.view(p_BP.shape[0], H + 2 * G, q_BHK.shape[2])
    R = cos_BR.shape[1]
    first, second, kept = heads[:, : H + G].float().split((R, R, heads.shape[2] - 2 * R), dim=-1)
    cos, sin = cos_BR[:, None], sin_BR[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1).to(q_BHK.dtype)
    q_BHK.copy_(turned[:, :H])
    place = past.long()
    k_BGLK.index_copy_(2, place, turned[:, H:, None])
    v_BGLK.index_copy_(2, place, heads[:, H + G :, None])
