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
