"""Which tokens are real and which of them each new token sees. Axes: B batch, T new tokens, L with the past."""

import torch
from torch import Tensor


def attention_mask_2d(mask: Tensor | None, past: int, input_ids: Tensor, past_valid: Tensor | None) -> Tensor | None:
    """The mask of all tokens, bool [B, past + T], False at padding; None where there is no padding at all.

    `mask` may cover all tokens or the new ones; `past_valid` [B, past] is what earlier calls said.
    """
    B, T = input_ids.shape
    if mask is None:
        # Nothing is looked at here: on a GPU that would wait for all the work before.
        return None if past_valid is None else torch.cat((past_valid, past_valid.new_ones(B, T)), dim=1)
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] not in (T, past + T):
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, expected {(B, past + T)} or {(B, T)}")
    mask = mask.to(device=input_ids.device, dtype=torch.bool)
    if mask.shape[1] == T and past:
        before = mask.new_ones(B, past) if past_valid is None else past_valid
        mask = torch.cat((before, mask), dim=1)
    return None if bool(mask.all()) else mask


def causal(tokens: int, length: int, device: torch.device) -> Tensor:
    """What the last `tokens` of `length` may attend to where there is no padding, bool [T, length]."""
    position = torch.arange(length, device=device)
    return position <= position[length - tokens :, None]


def visible(mask: Tensor | None, past: int, tokens: int, device: torch.device) -> Tensor | None:
    """What each of the new tokens may attend to, bool [B, 1, T, past + T].

    None where causality, each token after all of the past, says it all. A padded token sees itself alone, so that its
    row is finite.
    """
    if mask is None:
        return None
    position = torch.arange(past + tokens, device=device)
    itself = position == position[past:, None]
    return ((causal(tokens, past + tokens, device) & mask[:, None, :]) | itself)[:, None]


def left_padding(mask: Tensor) -> tuple[int, ...] | None:
    """Where each sequence of `mask` [B, L] begins, if that is all it says; None if there is padding elsewhere.

    Waits for the device.
    """
    first = mask.int().argmax(1)
    plain = mask.sum(1) == mask.shape[1] - first
    *starts, all_plain = torch.cat((first, plain.all()[None])).tolist()
    return tuple(starts) if all_plain else None
