"""Lightning attention: S_t = exp(-slope) S_{t-1} + k_t v_t^T, o_t = q_t S_t, per head, state in float32."""

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.lightning import blocked, reference


def lightning(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, K] and the state after the last token [B, H, K, K].

    q, k, v are float32 after silu, with k and v zero where `valid_BT` is False. `state_BHKK` may be overwritten;
    use the one returned.
    """
    assert q_BTHK.shape == k_BTHK.shape == v_BTHK.shape and state_BHKK.dtype == torch.float32
    if reference_forced():
        return reference.lightning(q_BTHK, k_BTHK, v_BTHK, slope_H, state_BHKK, valid_BT)
    if q_BTHK.shape[1] == 1 and valid_BT is None and not torch.is_grad_enabled():
        o_BHK, state_BHKK = blocked.step(q_BTHK[:, 0], k_BTHK[:, 0], v_BTHK[:, 0], slope_H, state_BHKK)
        return o_BHK.unsqueeze(1), state_BHKK
    return blocked.prefill(q_BTHK, k_BTHK, v_BTHK, slope_H, state_BHKK, valid_BT)
