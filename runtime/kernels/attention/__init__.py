"""Softmax attention of one new token per sequence over a cache whose length is read on the device.

Array axes: B batch, H query heads, G key-value heads, L places of the cache, K head dim.
"""

from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.attention import reference


def decode_attention(
    q_BHK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, past: Tensor, valid_BL: Tensor | None = None
) -> Tensor:
    """Outputs [B, H, K] in the dtype of q, H / G query heads to a key-value head, scaled by K^-1/2.

    The new token's own key and value stand at place `past` (int32 [1], on the device); it sees them and all places
    before that are True in `valid_BL` (bool), or all of them without one.
    """
    B, H, K = q_BHK.shape
    assert k_BGLK.shape == v_BGLK.shape and k_BGLK.shape[0] == B and k_BGLK.shape[3] == K and H % k_BGLK.shape[1] == 0
    if q_BHK.is_cuda and not reference_forced():
        from minibble.runtime.kernels.attention import fused

        return fused.decode(q_BHK, k_BGLK, v_BGLK, past, valid_BL)
    return reference.decode(q_BHK, k_BGLK, v_BGLK, past, valid_BL).to(q_BHK.dtype)
