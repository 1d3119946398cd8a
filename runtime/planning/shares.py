"""How often each expert is used: a share of its layer's uses, from a calibration's counts or alike for all.

Shares are whole numbers of 1/UNIT, so that sums of them do not depend on their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, product

from minibble.quantize.errors import ConfigError

UNIT = 1 << 40
# Experts of a layer that are left out together where all are used alike and few are left out: the other layers then
# need not ask the host which ones to bring. There are slots for so many anyway.
TOGETHER = 4

Expert = tuple[int, int]  # layer, expert


@dataclass(frozen=True, eq=False)
class Shares:
    """`layers[l][e]` is how much of layer l's work expert e does; made by `shares_of`."""

    layers: tuple[tuple[int, ...], ...]
    even: bool
    _sums: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)
    _missing: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        """The shares of all experts together."""
        return sum(map(sum, self.layers))

    def hottest(self, start: int, stop: int) -> list[Expert]:
        """The experts of the layers from `start` up to `stop`, the most used first; among equals layer after layer,
        so that what is left out is spread evenly, but for the last ones if all are equal."""
        if self.even:
            return sorted(product(range(start, stop), range(len(self.layers[0]))), key=self._even_place)
        ranked = []
        for layer in range(start, stop):
            row = self.layers[layer]
            order = sorted(range(len(row)), key=lambda expert: -row[expert])
            ranked += [(-row[expert], rank, layer, expert) for rank, expert in enumerate(order)]
        return [(layer, expert) for _, _, layer, expert in sorted(ranked)]

    @property
    def _together(self) -> int:
        return min(TOGETHER, len(self.layers[0]) // 8)

    def _even_place(self, expert: Expert) -> tuple[int, ...]:
        """Where one stands among equals: the last few of every second layer are the last of all, layer by layer. While
        a prompt is in one of these layers, nothing comes for the layer between, and experts of the next one can."""
        layer, rank = expert
        if layer % 2 and rank >= len(self.layers[0]) - self._together:
            return (1, layer, rank)
        return (0, rank, layer)

    def mass(self, start: int, stop: int, number: int) -> int:
        """The shares of the `number` hottest experts of the layers from `start` up to `stop`."""
        if self.even:
            return number * self.layers[0][0]
        if (start, stop) not in self._sums:
            merged = sorted(chain.from_iterable(self.layers[start:stop]), reverse=True)
            self._sums[start, stop] = tuple(accumulate(merged, initial=0))
        return self._sums[start, stop][number]

    def most_missing(self, start: int, stop: int, number: int) -> int:
        """The most experts of one of the layers that are not among the `number` hottest of all of them."""
        experts = len(self.layers[0])
        if self.even:
            alternate = stop // 2 - start // 2  # layers with an odd number
            missing = (stop - start) * experts - number
            if missing <= alternate * self._together:
                return min(missing, self._together)
            return max(self._together, experts - number // (stop - start))
        if (start, stop) not in self._missing:
            left, of_each = [experts] * (stop - start), [0] * experts + [stop - start]  # layers with so many left
            most = [most_left := experts]
            for layer, _ in self.hottest(start, stop):
                before = left[layer - start]
                left[layer - start] -= 1
                of_each[before] -= 1
                of_each[before - 1] += 1
                while not of_each[most_left] and most_left:
                    most_left -= 1
                most.append(most_left)
            self._missing[start, stop] = tuple(most)
        return self._missing[start, stop][number]


def shares_of(layers: int, experts: int, counts: Sequence[Sequence[int]] | None = None) -> Shares:
    """Shares from the tokens that each expert got, [layers][experts]; even without counts, and in layers without any.

    ConfigError if the counts are those of another model.
    """
    if counts is None:
        return _shares(((1,) * experts,) * layers)
    if len(counts) != layers or any(len(row) != experts or min(row) < 0 for row in counts):
        raise ConfigError(f"counts must have a number of at least 0 for each of {layers} layers × {experts} experts")
    return _shares(tuple(map(tuple, counts)))


@lru_cache(maxsize=8)  # with the sums of stretches of layers that plans ask for
def _shares(counts: tuple[tuple[int, ...], ...]) -> Shares:
    rows = tuple(tuple(UNIT * n // sum(row) if any(row) else UNIT // len(row) for n in row) for row in counts)
    return Shares(rows, even=len(set(chain.from_iterable(rows))) == 1)
