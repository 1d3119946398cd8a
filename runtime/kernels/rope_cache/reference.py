"""Rotary embedding and the places of keys and values in the cache, in plain torch."""

import torch
from torch import Tensor


def angles(positions: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, in float64, rounded to float32 [..., R]."""
    angle = positions.double()[..., None] * frequencies_R
    return angle.cos().float(), angle.sin().float()


def rope_cache(
    p_BTP: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor, q_BTHK: Tensor
) -> None:
    """Write rotated queries into `q_BTHK`, rotated keys and values into the caches from the index `past` on."""
    B, T, H, K = q_BTHK.shape
    G, R = k_BGLK.shape[1], cos_BTR.shape[2]
    heads = p_BTP.view(B, T, H + 2 * G, K)
    first, second, kept = heads[:, :, : H + G].float().split((R, R, K - 2 * R), dim=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1).to(q_BTHK.dtype)
    q_BTHK.copy_(turned[:, :, :H])
    places = past.long() + torch.arange(T, device=past.device)
    k_BGLK.index_copy_(2, places, turned[:, :, H:].transpose(1, 2))
    v_BGLK.index_copy_(2, places, heads[:, :, H + G :].transpose(1, 2))
