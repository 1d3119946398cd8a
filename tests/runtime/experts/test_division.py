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
        (9216, 1.65, 0.0, 0.0, 4608),  # no more than was measured
        (9216, 1.65, 0.0, 1.0, 0),
        (9216, 1.65, 1.7, 0.0, 0),  # to begin takes longer than to copy
        (9216, 1.65, 1.55, 0.0, 0),  # saves less than a tenth
        (768, 1.0, 0.0, 1 / 512, 256),
        (512, 1.0, 0.0, 0.0, 0),  # too few to measure
        (1000, 1.0, 0.0, 0.0, 0),  # no multiple of a step
    ],
)
def test_balance(
    monkeypatch: pytest.MonkeyPatch, units: int, copy_s: float, begin_s: float, each_s: float, expected: int
) -> None:
    monkeypatch.setattr(division, "AROUND_S", 0.0)
    asked: list[int] = []

    def compute_s(n: int) -> float:
        asked.append(n)
        return begin_s + each_s * n

    found, takes_s = balanced(units, 256, copy_s, compute_s)
    assert found == expected and (takes_s <= 0.9 * copy_s if found else takes_s == copy_s)
    assert all(n % 256 == 0 and 0 < n < units for n in asked)


def test_what_the_cpu_waits_for_counts() -> None:
    """A tenth of a millisecond: less than half is left to one as fast as the link."""
    assert balanced(9216, 256, 1.65e-3, lambda n: n * 1.65e-3 / 9216)[0] == 4096


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up experts are computed and copied; blocks longer than a step divide at their ends."""
    threads = torch.get_num_threads()
    copy = division.Copy(1 << 20, CPU)
    assert 0 < copy.seconds() < 60 and 0 < division.compute_seconds(division.made_up(128, 256, NF4()), copy) < 60
    copy.close()
    found = division.computed_units(128, 1024, NF4(), 1 << 20, CPU)
    assert found in (0, 256, 512) and torch.get_num_threads() == threads
    monkeypatch.setattr(division.Copy, "seconds", lambda self: 1.0)
    monkeypatch.setattr(division, "compute_seconds", lambda processor, copy: 0.0)
    assert division.computed_units(512, 2048, NF4(block_size=512), 1 << 20, CPU) == 1024


def test_the_quicker_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for quicker in (3, 4):
            torch.set_num_threads(4)
            monkeypatch.setattr(division.Copy, "seconds", lambda self: 1.0)
            monkeypatch.setattr(
                division,
                "compute_seconds",
                lambda processor, copy: processor.units / 2048 * (0.9 if torch.get_num_threads() == quicker else 1.2),  # noqa: B023
            )
            assert division.computed_units(128, 2048, NF4(), 1 << 20, CPU) > 0
            assert torch.get_num_threads() == quicker
        torch.set_num_threads(4)
        monkeypatch.setattr(division, "compute_seconds", lambda processor, copy: 60.0)
        assert division.computed_units(128, 2048, NF4(), 1 << 20, CPU) == 0 and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
