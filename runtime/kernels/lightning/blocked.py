"""Lightning attention in plain torch: one fused step for decoding, blocks of tokens for prefill.

Within a block the decayed products are one masked matrix product, between blocks the state carries them
(Lightning Attention-2, Qin et al., 2024, section 3). A padded token neither adds to the state nor decays it.
"""

import torch
from torch import Tensor

BLOCK = 256  # tokens; the model's own training block


def step(q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, slope_H: Tensor, state_BHKK: Tensor) -> tuple[Tensor, Tensor]:
    """One token of every sequence; updates `state_BHKK` in place."""
    state_BHKK.mul_(torch.exp(-slope_H)[:, None, None]).addcmul_(k_BHK.unsqueeze(-1), v_BHK.unsqueeze(-2))
    return torch.matmul(q_BHK.unsqueeze(-2), state_BHKK).squeeze(-2), state_BHKK


def prefill(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Many tokens of every sequence, in blocks; never writes into its inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    outputs = []
    for start in range(0, q.shape[2], BLOCK):
        part = slice(start, start + BLOCK)
        valid = None if valid_BT is None else valid_BT[:, part]
        age = _decay_exponents(slope_H, q[:, :, part].shape[2], valid)
        o, state_BHKK = _block(q[:, :, part], k[:, :, part], v[:, :, part], age, state_BHKK)
        outputs.append(o)
    return torch.cat(outputs, dim=2).transpose(1, 2), state_BHKK


def _decay_exponents(slope_H: Tensor, tokens: int, valid_BT: Tensor | None) -> Tensor:
    """Slope times the number of real tokens up to and with each one, [B or 1, H, T]."""
    if valid_BT is None:
        count = torch.arange(1, tokens + 1, device=slope_H.device, dtype=slope_H.dtype)[None]
    else:
        count = valid_BT.cumsum(1).to(slope_H.dtype)
    return slope_H[:, None] * count[:, None, :]


def _block(q: Tensor, k: Tensor, v: Tensor, age: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    apart = age[..., :, None] - age[..., None, :]
    earlier = torch.ones(apart.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weight = torch.exp(torch.where(earlier, -apart, float("-inf")))
    within = torch.matmul(torch.matmul(q, k.transpose(-1, -2)) * weight, v)
    before = torch.matmul(q * torch.exp(-age)[..., None], state)
    last = age[..., -1:]
    added = torch.matmul((k * torch.exp(age - last)[..., None]).transpose(-1, -2), v)
    return within + before, state * torch.exp(-last)[..., None] + added
