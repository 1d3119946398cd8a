"""Which tokens are real and which of them each new token sees. Axes: B batch, T new tokens, L with the past."""

import torch
from torch import Tensor


def attention_mask_2d(mask: Tensor | None, past: int, input_ids: Tensor, past_valid: Tensor | None) -> Tensor | None:
    """The mask of all tokens, bool [B, past + T], False at padding; None where there is no padding at all.

    `mask` may cover all tokens or the new ones; `past_valid` [B, past] is what earlier calls said.
    """
    B, T = input_ids.shape
    if mask is None:
        if past_valid is None:
            return None
        mask = torch.ones(B, T, dtype=torch.bool, device=input_ids.device)
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] not in (T, past + T):
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, expected {(B, past + T)} or {(B, T)}")
    mask = mask.to(device=input_ids.device, dtype=torch.bool)
    if mask.shape[1] == T and past:
        before = mask.new_ones(B, past) if past_valid is None else past_valid
        mask = torch.cat((before, mask), dim=1)
    return None if bool(mask.all()) else mask


def visible(mask: Tensor | None, past: int, tokens: int, device: torch.device) -> Tensor | None:
    """What each of the new tokens may attend to, bool [B or 1, 1, T, past + T].

    None where plain causality, or one token that sees everything, says it all. A padded token sees itself alone,
    so that its row is finite.
    """
    if mask is None and (past == 0 or tokens == 1):
        return None
    position = torch.arange(past + tokens, device=device)
    causal = position <= position[past:, None]
    if mask is None:
        return causal[None, None]
    itself = position == position[past:, None]
    return ((causal & mask[:, None, :]) | itself)[:, None]
