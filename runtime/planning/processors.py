"""Of which experts the CPU may compute a part: those that wait in host memory, as far as there is room for it twice."""

import torch

from minibble.quantize.inventory import TensorSpec
from minibble.runtime.devices import best_dtype
from minibble.runtime.layout import by_module
from minibble.runtime.plan import Source, module_nbytes
from minibble.runtime.planning.machine import Machine
from minibble.runtime.planning.placement import Placement

CPU = torch.device("cpu")


def computable(
    source: Source, placement: Placement, machine: Machine, units: int, dtype: torch.dtype | None = None
) -> list[tuple[int, int]]:
    """(layer, expert) of those of which `units` hidden units get the form of the CPU's kernels beside their record, the
    hottest of each layer first; activations there have `dtype`, by default the best for this CPU."""
    waiting = max(map(len, placement.pinned), default=0)
    keys = [(layer, ids[i]) for i in range(waiting) for layer, ids in enumerate(placement.pinned) if i < len(ids)]
    if machine.host_bytes is None:
        return keys
    each = expert_nbytes(source, units, dtype or best_dtype(CPU))
    return keys[: max(0, machine.host_bytes - placement.host_bytes) // each]


def expert_nbytes(source: Source, units: int, dtype: torch.dtype) -> int:
    """Bytes of so many of an expert's hidden units in the form of the CPU's kernels."""
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in source.inventory}
    modules = [[specs[name] for name in names] for _, names in by_module(source.config)]
    first = [module for module in modules if (module[0].layer, module[0].expert) == (0, 0)]
    return sum(module_nbytes(module, source, CPU, dtype) for module in first) * units // source.config.intermediate_size
