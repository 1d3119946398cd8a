"""Which layers go to which GPU: contiguous stretches, so that the GPUs hold as much of the experts' work as they can.

Every GPU's layers are chosen for a given budget. With a budget over all GPUs, each gets what its part of a split
balanced by time needs, less the same share of its experts everywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minibble.runtime.planning.device_bytes import Demand
from minibble.runtime.planning.machine import Gpu
from minibble.runtime.planning.rates import gpu_seconds
from minibble.runtime.planning.shares import Shares

BLOCKS = 20  # stretches begin at multiples of a 20th of the layers, or where they are balanced
POISON_RECORDS = 1  # what the table points to for an expert that is not there
_SCALE = 1 << 32  # parts of a budget are whole numbers of 1/_SCALE: rounding must not depend on their size


@dataclass(frozen=True)
class Split:
    """`bounds`: the layers of GPU d are bounds[d] to bounds[d + 1]; `room`: how many experts it may hold, slots
    included; `held`: the shares of the experts resident on all of them."""

    bounds: tuple[int, ...]
    budgets: tuple[int, ...]
    room: tuple[int, ...]
    held: int


@dataclass(frozen=True)
class Splitter:
    """What a split is chosen by. `step_bytes[l]` are what a step reads up to layer l; `head_bytes` for the head.

    A GPU that does not hold all experts of its layers needs slots to receive others in: `least_slots`, and as many as
    a layer misses, so that a prompt finds all of them at once.
    """

    gpus: tuple[Gpu, ...]
    demand: Demand
    shares: Shares
    experts: int
    least_slots: int
    step_bytes: tuple[float, ...]
    head_bytes: int

    @property
    def layers(self) -> int:
        return len(self.step_bytes) - 1

    def seconds(self, gpu: int, start: int, stop: int) -> float:
        """What a step takes there with every expert resident."""
        nbytes = self.step_bytes[stop] - self.step_bytes[start] + (stop == self.layers) * self.head_bytes
        return gpu_seconds(nbytes, stop - start, self.gpus[gpu])

    def fixed(self, start: int, stop: int) -> int:
        """Bytes of a GPU with these layers and none of their experts."""
        return sum(self.demand.parts(start, stop).values())

    def least(self, start: int, stop: int) -> int:
        """The least bytes with which a GPU can work on these layers."""
        received = self.received(start, stop, 0) * self.demand.model.record_bytes
        return min(self.fixed(start, stop) + received, self.most(start, stop))

    def slots(self, start: int, stop: int, resident: int) -> int:
        """How many slots a GPU needs that holds so many of the experts of these layers."""
        if resident == (stop - start) * self.experts:
            return 0
        return max(self.least_slots, self.shares.most_missing(start, stop, resident))

    def received(self, start: int, stop: int, resident: int) -> int:
        """Records beside the resident ones: the slots, and one that says that an expert is not there."""
        slots = self.slots(start, stop, resident)
        return slots + POISON_RECORDS if slots else 0

    def most(self, start: int, stop: int) -> int:
        """Bytes of a GPU with these layers and all of their experts."""
        return self.fixed(start, stop) + (stop - start) * self.experts * self.demand.model.record_bytes

    def room(self, start: int, stop: int, budget: int) -> int:
        """How many experts fit beside the rest; negative if not even that does."""
        return (budget - self.fixed(start, stop)) // self.demand.model.record_bytes

    def resident(self, start: int, stop: int, room: int) -> int | None:
        """How many experts stay on a GPU with room for so many; None if it cannot work on these layers."""
        everything = (stop - start) * self.experts
        if room >= everything:
            return everything
        if room < self.received(start, stop, 0):
            return None
        low, high = 0, everything  # one more resident is at most one slot less: what is needed never shrinks
        while high - low > 1:
            middle = (low + high) // 2
            fits = middle + self.received(start, stop, middle) <= room
            low, high = (middle, high) if fits else (low, middle)
        return low

    def held(self, start: int, stop: int, budget: int) -> int | None:
        """The shares of what stays on a GPU of `budget`; None if it cannot work on these layers."""
        resident = self.resident(start, stop, self.room(start, stop, budget))
        return None if resident is None else self.shares.mass(start, stop, resident)

    def balanced(self, number: int) -> tuple[int, ...]:
        """Bounds for the first `number` GPUs such that all take about the same time, whatever the budgets.

        Only the pieces of a prompt go through several GPUs at once, and the head is for its last token alone.
        """
        speeds = [1 / self.seconds(gpu, 0, self.layers) for gpu in range(number)]
        whole = self.step_bytes[-1]
        bounds, share = [0], 0.0
        for gpu in range(number - 1):
            share += speeds[gpu] / sum(speeds[:number])
            nearest = min(range(self.layers + 1), key=lambda layer: abs(self.step_bytes[layer] - share * whole))
            bounds.append(min(max(nearest, bounds[-1] + 1), self.layers - (number - 1 - gpu)))
        return (*bounds, self.layers)

    def best(self, number: int, limits: Sequence[int], total: int | None) -> Split | None:
        """The split over the first `number` GPUs of at most `limits` and `total` bytes that holds the most of the
        experts' work, and of several the most balanced one; None if there is none."""
        balanced = self.balanced(number)
        budgets = self.budgets(balanced, limits[:number], total)
        splits = [self._split(balanced, budgets)]
        if splits[0] is None or splits[0].held < self.shares.total:
            shifted = self._shifted(number, budgets)
            splits += [] if shifted is None else [self._split(shifted, budgets)]
        found = [split for split in splits if split is not None]
        return max(found, key=lambda split: split.held) if found else None

    def _split(self, bounds: tuple[int, ...], budgets: tuple[int, ...]) -> Split | None:
        stretches = list(zip(bounds, bounds[1:], budgets, strict=False))
        held = [self.held(*stretch) for stretch in stretches]
        if None in held:
            return None
        room = tuple(self.room(*stretch) for stretch in stretches)
        return Split(bounds, budgets, room, sum(h for h in held if h is not None))

    def _shifted(self, number: int, budgets: tuple[int, ...]) -> tuple[int, ...] | None:
        """The bounds at multiples of a block that hold the most, those of least squared times first."""
        block = max(1, self.layers // BLOCKS)
        grid = sorted({*range(0, self.layers, block), self.layers})
        best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0.0, (0,))}
        for gpu in range(number):
            reached: dict[int, tuple[int, float, tuple[int, ...]]] = {}
            for start, (held, cost, bounds) in best.items():
                for stop in self._stops(grid, start, number - 1 - gpu):
                    more = self.held(start, stop, budgets[gpu])
                    if more is None:
                        continue
                    new = (held + more, cost - self.seconds(gpu, start, stop) ** 2, (*bounds, stop))
                    if stop not in reached or new[:2] > reached[stop][:2]:
                        reached[stop] = new
            best = reached
        return best[self.layers][2] if self.layers in best else None

    def _stops(self, grid: list[int], start: int, later: int) -> Iterator[int]:
        """Where a GPU's layers may end if they begin at `start` and `later` GPUs follow."""
        if later == 0:
            return iter((self.layers,))
        return (stop for stop in grid[: len(grid) - later] if stop > start)

    def budgets(self, bounds: tuple[int, ...], limits: Sequence[int], total: int | None) -> tuple[int, ...]:
        """The parts of `total` for GPUs with the layers within `bounds`, none over its limit.

        None of them shrinks if `total` grows.
        """
        if total is None or sum(limits) <= total:
            return tuple(limits)
        stretches = list(zip(bounds, bounds[1:], limits, strict=False))
        wanted = [self.most(start, stop) for start, stop, _ in stretches]
        rest = total - sum(wanted)
        if rest >= 0 and all(most <= limit for most, limit in zip(wanted, limits, strict=True)):
            return tuple(min(most + rest // len(wanted), limit) for most, limit in zip(wanted, limits, strict=True))
        needs = [(self.least(a, b), max(self.most(a, b) - self.least(a, b), 1), limit) for a, b, limit in stretches]

        def parts(level: int) -> tuple[int, ...]:
            """Up to level 1 that share of the least; beyond, that many times the experts more."""
            low, high = min(level, _SCALE), max(level - _SCALE, 0)
            return tuple(min((least * low + more * high) // _SCALE, limit) for least, more, limit in needs)

        low, high = 0, _SCALE * (1 + max(-(-limit // more) for _, more, limit in needs))
        while high - low > 1:
            level = (low + high) // 2
            low, high = (level, high) if sum(parts(level)) <= total else (low, level)
        return parts(low)
