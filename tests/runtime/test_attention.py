"""Masks, and attention with and without them."""

import pytest
import torch

from minibble.runtime.attention import attend, attend_from
from minibble.runtime.masks import left_padding, visible

B, H, G, L, K = 4, 6, 2, 12, 16


def padded(starts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([[position >= start for position in range(L)] for start in starts])


@pytest.mark.parametrize("tokens", [1, 5, L])
@pytest.mark.parametrize("starts", [(0, 3, 8, 11), (7, 8, 0, 9)], ids=str)
def test_from_the_start_on_is_what_the_mask_says(starts: tuple[int, ...], tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(B, H, tokens, K, generator=generator)
    k, v = torch.randn(2, B, G, L, K, generator=generator)
    mask = padded(starts)
    right = attend(q, k, v, visible(mask, L - tokens, tokens, q.device))
    k[1, :, : starts[1]] = float("nan")  # what padding left there is not looked at
    ours = attend_from(starts, q, k, v)
    real = mask[:, L - tokens :, None].expand(B, tokens, K)[:, None].expand_as(right)
    assert torch.allclose(ours[real], right[real], atol=1e-6)
    assert (ours[~real] == 0).all()


def test_left_padding_is_told_from_other_padding() -> None:
    assert left_padding(padded((0, 3, 8, 11))) == (0, 3, 8, 11)
    for row, column in ((0, 11), (1, 5)):
        mask = padded((0, 3, 8, 11))
        mask[row, column] = False
        assert left_padding(mask) is None
    assert left_padding(torch.zeros(2, 3, dtype=torch.bool)) is None
