"""What to say where no placement fits: what is missing, and the nearest plans that would do."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from minibble.quantize.errors import BudgetError
from minibble.quantize.sizes import decimal
from minibble.runtime.planning.device_bytes import MAPPED_SHARE
from minibble.runtime.planning.machine import Machine
from minibble.runtime.planning.split import Split, Splitter


class GpuShortage(BudgetError):
    """GPUs cannot hold what is not experts."""


def gpu_shortage(
    splitter: Callable[[int], Splitter], limits: Sequence[int], total: int | None, context: int, batch: int
) -> GpuShortage:
    """The error for GPUs that cannot even hold what is not experts; `splitter` makes one for any context."""
    planner = splitter(context)
    numbers = range(1, min(len(limits), planner.layers) + 1)
    number = min(numbers, key=lambda n: _missing(planner, n, limits, total))
    tokens = f"{batch} × {context} tokens" if batch > 1 else f"a context of {context} tokens"
    message = f"{_needs(planner, number, limits, total)} for {tokens}; {_would_do(planner, number, limits, total)}"
    fitting = _largest_context(splitter, limits, total, context)
    return GpuShortage(message + (f"; or a context of {fitting} tokens" if fitting else ""))


def _stretches(planner: Splitter, number: int) -> list[tuple[int, int]]:
    return list(pairwise(planner.balanced(number)))


def _missing(planner: Splitter, number: int, limits: Sequence[int], total: int | None) -> int:
    """Bytes by which the first `number` GPUs fall short."""
    least = [planner.least(*stretch) for stretch in _stretches(planner, number)]
    each = sum(max(0, nbytes - limit) for nbytes, limit in zip(least, limits, strict=False))
    return max(each, 0 if total is None else sum(least) - total)


def _needs(planner: Splitter, number: int, limits: Sequence[int], total: int | None) -> str:
    parts: dict[str, int] = {}
    least = 0
    for stretch in _stretches(planner, number):
        least += planner.least(*stretch)
        for name, nbytes in planner.demand.parts(*stretch).items():
            parts[name] = parts.get(name, 0) + nbytes
    parts["slots_bytes"] = least - sum(parts.values())
    devices = " and ".join(gpu.device for gpu in planner.gpus[:number])
    listed = ", ".join(f"{name.removesuffix('_bytes').replace('_', ' ')} {decimal(n)}" for name, n in parts.items())
    allowed = sum(limits[:number]) if total is None else min(total, sum(limits[:number]))
    verb = "needs" if number == 1 else "need"
    return f"{devices} {verb} {decimal(least)} without any resident expert ({listed}), of {decimal(allowed)} allowed,"


def _would_do(planner: Splitter, number: int, limits: Sequence[int], total: int | None) -> str:
    """More for all GPUs together, and for those that are too small themselves."""
    least = [planner.least(*stretch) for stretch in _stretches(planner, number)]
    small = [
        f"{exactly(nbytes - limit)} more on {gpu.device}"
        for nbytes, limit, gpu in zip(least, limits, planner.gpus, strict=False)
        if nbytes > limit
    ]
    short = 0 if total is None else sum(least) - total
    wanted = small if short <= 0 else [*small, f"{exactly(short)} more in all"]
    rest = " (or leave out the GPUs that are too small)" if small and len(planner.gpus) > len(small) else ""
    return f"{' and '.join(wanted)} would do{rest}"


def exactly(nbytes: int) -> str:
    """`nbytes` with the unit's tenths rounded up, so that so much is enough."""
    for unit in (10**12, 10**9, 10**6, 10**3):
        if nbytes >= unit:
            return decimal(-(-nbytes // (unit // 10)) * (unit // 10))
    return decimal(nbytes)


def _largest_context(
    splitter: Callable[[int], Splitter], limits: Sequence[int], total: int | None, context: int
) -> int | None:
    """The largest context below `context` with which the GPUs can work; None if there is none."""

    def works(tokens: int) -> bool:
        planner = splitter(tokens)
        numbers = range(1, min(len(limits), planner.layers) + 1)
        return any(planner.best(number, limits, total) is not None for number in numbers)

    low, high = 0, context
    while high - low > 1:
        tokens = (low + high) // 2
        low, high = (tokens, high) if works(tokens) else (low, tokens)
    return low or None


def host_shortage(planner: Splitter, splits: Sequence[Split], machine: Machine, staging: int) -> BudgetError:
    """The error for experts that are left over by all of `splits`, and fit neither in host memory nor on disk.

    With some on disk each GPU needs `staging` records of host memory.
    """
    record = planner.demand.model.record_bytes
    fullest = max(splits, key=lambda split: _residents(planner, split))
    missing = planner.layers * planner.experts - _residents(planner, fullest)
    staging *= len(fullest.budgets)
    host = machine.host_bytes or 0
    disk = (missing - max(host // record - staging, 0)) * record
    mapped = MAPPED_SHARE * len(splits[-1].budgets)  # more pinned memory leaves less on the GPUs
    more = int((missing * record - host) / (1 - mapped)) + record
    allowed = "" if machine.disk_bytes is None else f", the disk {decimal(machine.disk_bytes)}"
    return BudgetError(
        f"{missing} experts, {decimal(missing * record)}, fit on no GPU, and host memory may hold {decimal(host)}"
        f"{allowed}; {exactly(more)} more host memory would do, or about as much more GPU memory, "
        f"or {exactly(disk)} on disk with {exactly(staging * record)} of host memory at least"
    )


def _residents(planner: Splitter, split: Split) -> int:
    stretches = zip(split.bounds, split.bounds[1:], split.room, strict=False)
    return sum(planner.resident(*stretch) or 0 for stretch in stretches)
