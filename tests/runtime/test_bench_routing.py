"""Routers of random models: that they choose by the law they are made for."""

import pytest
import torch

from minibble.runtime.bench import routing


@pytest.mark.parametrize(("experts", "active"), [(32, 2), (16, 1), (5, 1)])
def test_choices_follow_the_law(experts: int, active: int) -> None:
    wanted = routing.zipf_shares(experts, active)
    fresh = torch.randn(100_000, experts, generator=torch.Generator().manual_seed(7))
    found = routing.shares_of(routing.row_lengths(experts, active), fresh, active)
    assert float(found.sum()) == pytest.approx(active)
    assert torch.allclose(found, wanted, rtol=0.12, atol=0.003)


def test_every_layer_has_an_order_of_its_own() -> None:
    ranks = routing.ranks(4, 32)
    assert all(sorted(row.tolist()) == list(range(32)) for row in ranks)
    assert len({tuple(row.tolist()) for row in ranks}) == 4


def test_noise_is_chosen_by_the_hidden_state() -> None:
    """Another token, another row, each row as often as the others; the same token always the same one."""
    x = torch.randn(50_000, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    rows = torch.arange(routing.NOISE_ROWS)[:, None].expand(-1, 2)
    found = routing.by_noise(lambda y: y[:, 0], rows)(x)
    assert torch.equal(found, routing.by_noise(lambda y: y[:, 0], rows)(x))
    counts = torch.bincount(found, minlength=routing.NOISE_ROWS)
    assert counts.min() > 10 and counts.max() < 150
