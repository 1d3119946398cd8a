"""GPUs from their sizes, and how much each expert is used."""

from collections import Counter

import pytest

from minibble.quantize.errors import ConfigError
from minibble.runtime.planning.machine import Machine, gpu_sizes
from minibble.runtime.planning.shares import shares_of

GB = 10**9


def test_layers_without_counts_are_even() -> None:
    shares = shares_of(2, 4, [[0, 0, 0, 0], [6, 2, 0, 0]])
    assert [[share / 2**40 for share in row] for row in shares.layers] == [[0.25] * 4, [0.75, 0.25, 0, 0]]
    assert shares.hottest(0, 2)[:4] == [(1, 0), (0, 0), (0, 1), (1, 1)]


def test_few_of_equals_are_left_out_together() -> None:
    """Four of every second layer, then evenly; and how many of a layer are left out is known without counting."""
    for experts, layers in ((32, range(80)), (32, range(3, 10)), (5, range(2, 8)), (64, range(1, 2))):
        shares = shares_of(80, experts)
        order, number = shares.hottest(layers.start, layers.stop), experts * len(layers)
        assert sorted(order) == [(layer, expert) for layer in layers for expert in range(experts)]
        for resident in range(number + 1):
            left = Counter(layer for layer, _ in order[resident:])
            assert shares.most_missing(layers.start, layers.stop, resident) == max(left.values(), default=0)
            if experts == 32 and number - resident <= 4 * (len(layers) // 2):
                assert len(left) == -(-(number - resident) // 4) and all(layer % 2 for layer in left)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("2x141GB", [141, 141]), ("80GB,141GB", [80, 141]), (" 2 x 80GB, 24GB ", [80, 80, 24]), ("141GB", [141])],
)
def test_sizes_of_gpus(text: str, sizes: list[int]) -> None:
    assert gpu_sizes(text) == tuple(size * GB for size in sizes)
    rates = [gpu.read_bytes_per_s for gpu in Machine.of_sizes(gpu_sizes(text)).gpus]
    assert rates == [4.35e12 if size == 141 else 3.09e12 for size in sizes]


@pytest.mark.parametrize("text", ["", "2x", "0x80GB", "65x80GB", "80GB,", "0GB", "-1x80GB", "x80GB", "twox80GB"])
def test_no_list_of_gpus(text: str) -> None:
    with pytest.raises(ConfigError):
        gpu_sizes(text)
