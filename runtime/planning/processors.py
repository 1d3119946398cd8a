"""Of which experts the CPU computes a part: those that wait in host memory, as far as there is room for it beside."""

import torch

from minibble.quantize.inventory import TensorSpec
from minibble.runtime.layout import by_module
from minibble.runtime.plan import Source, module_nbytes
from minibble.runtime.planning.machine import Machine
from minibble.runtime.planning.placement import Ids

CPU = torch.device("cpu")


def computable(pinned: Ids, host_bytes: int, machine: Machine) -> tuple[tuple[int, int], ...]:
    """(layer, expert) of those of `pinned` that are divided, the first of each layer first, where `host_bytes` are
    taken by others."""
    if machine.division is None:
        return ()
    waiting = max(map(len, pinned), default=0)
    keys = tuple((layer, ids[i]) for i in range(waiting) for layer, ids in enumerate(pinned) if i < len(ids))
    if machine.host_bytes is None:
        return keys
    return keys[: max(0, machine.host_bytes - host_bytes) // machine.division.nbytes]


def part_nbytes(source: Source, units: int, dtype: torch.dtype) -> int:
    """Bytes of so many of an expert's hidden units in the form of the CPU's kernels, for activations of `dtype`."""
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in source.inventory}
    modules = [[specs[name] for name in names] for _, names in by_module(source.config)]
    first = [module for module in modules if (module[0].layer, module[0].expert) == (0, 0)]
    return sum(module_nbytes(module, source, CPU, dtype) for module in first) * units // source.config.intermediate_size
