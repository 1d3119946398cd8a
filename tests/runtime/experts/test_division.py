"""How much of a missing expert the CPU computes."""

import pytest
import torch

from minibble.quantize.nf4 import NF4
from minibble.runtime.experts import division
from minibble.runtime.experts.division import balanced

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("units", "copy_s", "begin_s", "each_s", "expected"),
    [
        (9216, 1.65, 0.32, 0.178e-3, 3584),  # 3,720 would be even
        (9216, 1.65, 0.0, 1.65 / 9216, 4608),  # as fast as the copy engine: half of it
        (9216, 1.65, 0.0, 0.0, 8960),  # at least one step comes
        (9216, 1.65, 0.0, 1.0, 0),
        (9216, 1.65, 1.7, 0.0, 0),  # to begin takes longer than to copy
        (9216, 1.65, 1.55, 0.0, 0),  # saves less than a tenth
        (768, 1.0, 0.0, 1 / 512, 256),
        (512, 1.0, 0.0, 0.0, 0),  # too few to measure
        (1000, 1.0, 0.0, 0.0, 0),  # no multiple of a step
    ],
)
def test_balance(units: int, copy_s: float, begin_s: float, each_s: float, expected: int) -> None:
    asked: list[int] = []

    def compute_s(n: int) -> float:
        asked.append(n)
        return begin_s + each_s * n

    assert balanced(units, 256, copy_s, compute_s) == expected
    assert all(n % 256 == 0 and 0 < n < units for n in asked)


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up experts are computed and copied; blocks longer than a step divide at their ends."""
    assert 0 < division.copy_seconds(1 << 20, CPU) < 60 and 0 < division.compute_seconds(128, 256, NF4()) < 60
    found = division.computed_units(128, 1024, NF4(), 1 << 20, CPU)
    assert found % 256 == 0 and 0 <= found < 1024
    monkeypatch.setattr(division, "compute_seconds", lambda D, units, format: 0.0)
    assert division.computed_units(128, 2048, NF4(block_size=512), 1 << 20, CPU) == 1536
