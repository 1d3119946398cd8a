"""How much of a missing expert the CPU can compute while the GPU reads the rest of it.

An expert is a sum over its hidden units, and those can be divided: the GPU takes the first ones, the CPU the last.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import cycle, islice
from statistics import mean
from typing import Literal

import torch

from minibble.quantize.formats import Format
from minibble.runtime.devices import best_dtype
from minibble.runtime.experts.host import HostRecords
from minibble.runtime.experts.lanes import lane_for
from minibble.runtime.experts.processor import Processor
from minibble.runtime.kernels.tiles import COLUMNS
from minibble.runtime.plan import Source
from minibble.runtime.planning.device_bytes import model_bytes
from minibble.runtime.planning.machine import Division, Machine
from minibble.runtime.planning.placement import Placement
from minibble.runtime.planning.processors import part_nbytes
from minibble.runtime.planning.rates import IN_PLACE_SHARE

CPU = torch.device("cpu")
LEAST_GAIN = 0.1  # of the time that reading takes, for which the CPU is asked
# Beside the computing: until what the CPU needs has come to host memory, and until the GPU goes on with what it made.
AROUND_S = 1e-4
_WARM, _ROUNDS = 8, 24  # experts before: threads start and clocks rise; and those that count
_TIMED_NBYTES = 1 << 30  # of different ones: more than a processor's caches hold, as in decoding


def helped(machine: Machine, source: Source, dtype: torch.dtype, device: torch.device) -> Machine:
    """`machine` with its CPU computing parts of experts that miss on `device`; as it is, and a warning, if that would
    not help."""
    config, format, record = source.config, source.format, model_bytes(source, dtype).record_bytes
    assert format is not None
    units = computed_units(config.hidden_size, config.intermediate_size, format, record, device)
    if not units:
        warnings.warn(
            f"the CPU computes no parts of experts: with {config.intermediate_size} hidden units, on "
            f"{torch.get_num_threads()} threads, that would save less than a tenth of the time to read them",
            stacklevel=3,
        )
        return machine
    return replace(machine, division=division_at(source, units))


def division_at(source: Source, units: int) -> Division:
    """The one of the experts of `source`, in 4 bits, that leaves so many hidden units to this CPU."""
    assert source.format is not None
    nbytes = part_nbytes(source, units, best_dtype(CPU))
    return Division(units, source.config.intermediate_size, unit_step(source.format), nbytes)


def unit_step(format: Format) -> int:
    """Hidden units are divided at multiples of it: kernels take whole chunks, and blocks remain whole."""
    return math.lcm(COLUMNS, format.block_size)


def warn_unless_planned(machine: Machine, placement: Placement) -> None:
    """A warning if the CPU was to help, some experts will miss, and the plan does not expect it to gain anything."""
    if machine.division is not None and placement.expected_hit_rate < 1 and not placement.computed:
        warnings.warn(
            "the CPU computes no parts of experts: too few that miss find room in host memory a second time for that "
            "to be quicker than reading them there",
            stacklevel=3,
        )


def computed_units(D: int, F: int, format: Format, record_nbytes: int, device: torch.device) -> int:
    """Of the `F` hidden units of experts of hidden size `D` those that the CPU should compute, measured now on made-up
    ones; 0 where it would not help.

    torch is left with the number of threads that was the quicker, all or all but one: this process and the driver have
    other threads, and the slowest of those that share an expert counts.
    """
    threads = torch.get_num_threads()
    copy = Copy(record_nbytes, device)
    try:
        read_s, found, made = copy.seconds() / IN_PLACE_SHARE, {}, cache(lambda units: made_up(D, units, format))
        for number in range(max(1, threads - 1), threads + 1):
            torch.set_num_threads(number)
            found[number] = balanced(F, unit_step(format), read_s, lambda units: compute_seconds(made(units), copy))
    finally:
        torch.set_num_threads(threads)
        copy.close()
    best = min(found, key=lambda number: found[number][1])
    if found[best][0]:
        torch.set_num_threads(best)
    return found[best][0]


def balanced(units: int, step: int, read_s: float, compute_s: Callable[[int], float]) -> tuple[int, float]:
    """The multiple of `step` with which the CPU takes as long as reading the others of `units`, at most half of them;
    and the seconds that both take. 0 where that would gain little.

    To read all of them takes `read_s`, and n of them `compute_s(n)`, which is asked twice and taken to grow evenly.
    """
    if units % step or units < 3 * step:
        return 0, read_s
    small, large = max(step, units // 4 // step * step), max(2 * step, units // 2 // step * step)
    each_s = max(0.0, compute_s(large) - (begin_s := compute_s(small))) / (large - small)
    begin_s = max(0.0, begin_s - each_s * small) + AROUND_S  # what it takes however few they are
    found = int((read_s - begin_s) / (read_s / units + each_s)) // step * step
    found = max(0, min(found, large))
    takes_s = max(read_s * (1 - found / units), begin_s + each_s * found)
    return (found, takes_s) if found and takes_s <= (1 - LEAST_GAIN) * read_s else (0, read_s)


def made_up(D: int, units: int, format: Format) -> Processor:
    """Experts of hidden size `D`, of which the CPU has so many hidden units: as many as no cache holds."""
    number = min(_WARM + _ROUNDS, -(-_TIMED_NBYTES // format.nbytes((3 * units, D))))
    processor = Processor([(0, expert) for expert in range(number)], units)
    kinds: tuple[tuple[Literal["gate_up", "down"], list[tuple[int, int]]], ...]
    kinds = ("gate_up", [(units, D), (units, D)]), ("down", [(D, units)])
    for kind, shapes in kinds:
        codes, scales = torch.zeros(D * units // 2, dtype=torch.uint8), torch.ones(D * units // format.block_size)
        processor.put((0, 0), kind, [format.assemble(shape, codes, scales, torch.bfloat16) for shape in shapes])
    processor.repeat((0, 0))
    return processor


def compute_seconds(processor: Processor, copy: "Copy") -> float:
    """How long the CPU takes for one token and its units of an expert, as in decoding: while others come, and after it
    has waited for some."""
    x, times = torch.ones(1, processor.columns), []
    for key in islice(cycle(sorted(processor.keys)), _WARM + _ROUNDS):
        copy.begin()
        began = time.perf_counter()
        processor(key, x)
        times.append(time.perf_counter() - began)
        copy.end()
    return mean(times[_WARM:])


class Copy:
    """A record of `nbytes` in pinned host memory, to be copied to `device` again and again."""

    def __init__(self, nbytes: int, device: torch.device):
        self.lane, self.slot = lane_for(device), torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.lane.begin(self.slot)
        self.memory = HostRecords(self.lane, nbytes, 1)
        # Where none can be pinned, experts come from ordinary memory as well.
        self.source = self.memory.records[0] if self.memory.records else torch.zeros(nbytes, dtype=torch.uint8)

    def begin(self) -> None:
        """Issue a copy."""
        self.lane.bring(self.slot, self.source, None)

    def end(self) -> None:
        """Wait for it."""
        self.lane.finish()

    def seconds(self) -> float:
        """How long one takes: the quickest of a few."""
        times = []
        for _ in range(3):
            self.end()
            began = time.perf_counter()
            self.begin()
            self.end()
            times.append(time.perf_counter() - began)
        return min(times)

    def close(self) -> None:
        """Give the memory back: what is loaded next has the whole of its budget."""
        self.memory.close()
        self.slot = self.slot[:0].clone()
        if self.slot.is_cuda:
            torch.cuda.empty_cache()
