"""Of which experts the CPU computes a part, and how large a one, as far as there is room for it in host memory.

What is saved is about the same for a half of some and a quarter of twice as many; the latter leave the CPU more time.
"""

from collections.abc import Iterator

import torch

from minibble.quantize.inventory import TensorSpec
from minibble.runtime.layout import by_module
from minibble.runtime.plan import Source, module_nbytes
from minibble.runtime.planning.machine import Division, Machine
from minibble.runtime.planning.placement import Ids

CPU = torch.device("cpu")


def divisions(read: Ids, host_bytes: int, machine: Machine) -> Iterator[tuple[Division, tuple[tuple[int, int], ...]]]:
    """The ways to divide experts of those that are `read` in place, where `host_bytes` are taken by others: how, and
    (layer, expert) of as many as there is room for, the first of each layer first."""
    if machine.division is None or not any(read):
        return
    waiting = max(map(len, read), default=0)
    keys = tuple((layer, ids[i]) for i in range(waiting) for layer, ids in enumerate(read) if i < len(ids))
    for division in machine.division.smaller:
        if machine.host_bytes is None:
            yield division, keys
        elif room := max(0, machine.host_bytes - host_bytes) // division.nbytes:
            yield division, keys[:room]


def part_nbytes(source: Source, units: int, dtype: torch.dtype) -> int:
    """Bytes of so many of an expert's hidden units in the form of the CPU's kernels, for activations of `dtype`."""
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in source.inventory}
    modules = [[specs[name] for name in names] for _, names in by_module(source.config)]
    first = [module for module in modules if (module[0].layer, module[0].expert) == (0, 0)]
    return sum(module_nbytes(module, source, CPU, dtype) for module in first) * units // source.config.intermediate_size
