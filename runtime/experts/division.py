"""How much of a missing expert the CPU computes, while the rest of it is copied to the GPU.

An expert is a sum over its hidden units, and those can be divided: the first ones come, the CPU takes the last.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

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
from minibble.runtime.planning.processors import part_nbytes

CPU = torch.device("cpu")
LEAST_GAIN = 0.1  # of the time that a copy takes, for which the CPU is asked
_TIMED = 3  # copies, of which the quickest counts, and different experts that the CPU is timed with


def helped(machine: Machine, source: Source, dtype: torch.dtype, device: torch.device) -> Machine:
    """`machine` with its CPU computing parts of experts that miss on `device`, where that helps."""
    config, format, record = source.config, source.format, model_bytes(source, dtype).record_bytes
    assert format is not None
    units = computed_units(config.hidden_size, config.intermediate_size, format, record, device)
    if not units:
        return machine
    part = Division(units, units / config.intermediate_size, part_nbytes(source, units, best_dtype(CPU)))
    return replace(machine, division=part)


def computed_units(D: int, F: int, format: Format, record_nbytes: int, device: torch.device) -> int:
    """Of the `F` hidden units of experts of hidden size `D` those that the CPU should compute, measured now on made-up
    ones; 0 where it would not help.

    torch is left with the number of threads that was the quicker, all or all but one: this process and the driver have
    other threads, and the slowest of those that share an expert counts.
    """
    step, threads = math.lcm(COLUMNS, format.block_size), torch.get_num_threads()
    copy_s = copy_seconds(record_nbytes, device)
    found = {}
    for number in range(max(1, threads - 1), threads + 1):
        torch.set_num_threads(number)
        found[balanced(F, step, copy_s, lambda units: compute_seconds(D, units, format))] = number
    best = max(found)
    torch.set_num_threads(found[best] if best else threads)
    return best


def balanced(units: int, step: int, copy_s: float, compute_s: Callable[[int], float]) -> int:
    """The multiple of `step` with which the CPU takes as long as copying the others of `units`.

    All of them take `copy_s` to come, and n of them `compute_s(n)`, which is asked twice and taken to grow evenly.
    """
    if units % step or units < 3 * step:
        return 0
    small, large = max(step, units // 4 // step * step), max(2 * step, units // 2 // step * step)
    each_s = max(0.0, compute_s(large) - (begin_s := compute_s(small))) / (large - small)
    begin_s = max(0.0, begin_s - each_s * small)  # what it takes however few they are
    found = int((copy_s - begin_s) / (copy_s / units + each_s)) // step * step
    found = max(0, min(found, units - step))
    takes_s = max(copy_s * (1 - found / units), begin_s + each_s * found)
    return found if found and takes_s <= (1 - LEAST_GAIN) * copy_s else 0


def copy_seconds(nbytes: int, device: torch.device) -> float:
    """How long so many bytes take from pinned host memory to `device`."""
    lane, slot, times = lane_for(device), torch.empty(nbytes, dtype=torch.uint8, device=device), []
    lane.begin(slot)
    memory = HostRecords(lane, nbytes, 1)
    source = memory.records[0] if memory.records else torch.zeros(nbytes, dtype=torch.uint8)
    for _ in range(_TIMED):
        lane.finish()
        began = time.perf_counter()
        lane.bring(slot, source, None)
        lane.finish()
        times.append(time.perf_counter() - began)
    memory.close()
    del slot
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is loaded next has the whole of its budget
    return min(times)


def compute_seconds(D: int, units: int, format: Format) -> float:
    """How long the CPU takes for one token and so many hidden units of an expert."""
    keys = [(0, expert) for expert in range(_TIMED)]
    processor = Processor(keys, units)
    first, last = ((units, D), (D, units))
    for key in keys:
        for kind, shapes in (("gate_up", (first, first)), ("down", (last,))):
            blocks = D * units // format.block_size
            codes = torch.zeros(D * units // 2, dtype=torch.uint8)
            part = format.assemble(shapes[0], codes, torch.ones(blocks), torch.bfloat16)
            processor.put(key, kind, [part] * len(shapes))  # type: ignore[arg-type]
    return processor.seconds()
