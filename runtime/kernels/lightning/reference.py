"""Lightning attention, one token after the other."""

import torch
from torch import Tensor


def lightning(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `minibble.runtime.kernels.lightning.lightning`; any float dtype."""
    outputs = []
    decay_H11 = torch.exp(-slope_H.to(state_BHKK.dtype))[:, None, None]
    for t in range(q_BTHK.shape[1]):
        update = k_BTHK[:, t, :, :, None] * v_BTHK[:, t, :, None, :]
        new = decay_H11 * state_BHKK + update
        if valid_BT is not None:
            new = torch.where(valid_BT[:, t, None, None, None], new, state_BHKK)
        state_BHKK = new
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKK))
    return torch.stack(outputs, dim=1), state_BHKK
