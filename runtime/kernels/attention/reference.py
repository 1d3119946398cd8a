"""Softmax attention of one token per sequence over the cache, in float32 over all its places."""

import torch
from torch import Tensor


def decode(q_BHK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor, valid_BL: Tensor | None) -> Tensor:
    """Outputs [B, H, K], float32; see the package for the arguments."""
    B, H, K = q_BHK.shape
    G, L = k_BGLK.shape[1:3]
    place = torch.arange(L, device=q_BHK.device)
    seen = (place <= past).expand(B, L)
    if valid_BL is not None:
        seen = seen & (valid_BL.bool() | (place == past))
    mask = seen[:, None, None]
    # Places that were never written may hold anything, so a weight of 0 is not enough.
    k, v = (x.float().masked_fill(~seen[:, None, :, None], 0.0) for x in (k_BGLK, v_BGLK))
    q = q_BHK.float().view(B, G, H // G, K) * K**-0.5
    scores = torch.matmul(q, k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), v).view(B, H, K)
