"""From a model, a machine and a budget to a placement."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch

from minibble.quantize.errors import BudgetError, ConfigError
from minibble.runtime.experts.in_place import worthwhile
from minibble.runtime.experts.tiers import BUFFERS
from minibble.runtime.plan import PREFILL_CHUNK_CUDA, Source
from minibble.runtime.planning.device_bytes import Demand, default_chunk, model_bytes
from minibble.runtime.planning.machine import Division, Gpu, Machine
from minibble.runtime.planning.placement import DevicePlan, Ids, Placement
from minibble.runtime.planning.processors import divisions
from minibble.runtime.planning.rates import HOP_S, STEP_S, Missed, chances, saved_seconds, summed
from minibble.runtime.planning.shares import Expert, shares_of
from minibble.runtime.planning.shortage import GpuShortage, gpu_shortage, host_shortage
from minibble.runtime.planning.split import Split, Splitter

# A layer's experts are received while the ones before them are in use: two sets of those that a token needs.
SLOT_SETS = 2
STAGING_RECORDS = BUFFERS  # in host memory, that experts from disk pass through
# Of one layer and token of a prompt, measured on an H100 and an H200: 8,192 tokens through 8 layers in 127 ms.
PREFILL_S = 1.94e-6
MOST_CHUNK = 4 * PREFILL_CHUNK_CUDA
HALVED = 3  # times that pieces of prompts are halved where memory is short
MOST_LOST = 0.02  # of the rate of decoding, for larger pieces of prompts
ABOUT = 0.9  # of what a step can gain by the CPU is as good
# Pieces of a prompt overlap on several GPUs: 8,192 tokens on two H200 took 0.94 s by 2,048 at a time, 1.01 by 4,096.
PIPELINE_PIECES = 2
# A placement for pieces of so many tokens, bytes pinned, and bytes of the embedding moved.
Planned = Callable[[int, int, int], Placement]


def plan_placement(
    source: Source,
    machine: Machine,
    *,
    dtype: torch.dtype = torch.bfloat16,
    context: int,
    batch: int = 1,
    gpu_memory: int | Sequence[int] | None = None,
    counts: Sequence[Sequence[int]] | None = None,
    prefill_chunk: int | None = None,
    slots: int | None = None,
) -> Placement:
    """The placement of `source` on `machine` that keeps most of the experts' work on GPUs, and of these the quickest.

    `gpu_memory` in bytes bounds all GPUs together, or each one if it is a sequence. `counts` [layers][experts] are the
    tokens of each expert in a calibration: the hottest stay on GPUs, then in host memory. `slots` of a GPU that misses
    experts are by default twice what a token needs, or what a layer misses if that is more. Prompts enter by
    `prefill_chunk` tokens at a time, by default as many as it takes for their work to last as long as experts take to
    come, if decoding loses little by the memory for it; fewer where GPUs work on several pieces at once. GPUs at the
    end that would not help are left out. Where some experts fit on no GPU, the embedding, of which a step reads a row,
    leaves its place to others and waits in host memory. BudgetError says what is missing and what would fit,
    ConfigError that the experts are not in 4 bits or not in a layout that the kernels read.
    """
    planned = partial(_planned, source, machine, dtype, context, batch, gpu_memory, counts, slots)
    elsewhere = partial(_with_some_elsewhere, planned, source, machine, dtype)
    chunk = prefill_chunk or default_chunk(batch)
    whole = []
    for piece in (chunk,) if prefill_chunk else (chunk, max(1, chunk // PIPELINE_PIECES)):
        with suppress(BudgetError):
            whole.append(planned(piece, 0, 0))
    whole = [placed for placed in whole if placed.expected_hit_rate == 1]
    if whole:
        return whole[-1] if len(whole[-1].devices) > 1 else whole[0]
    for piece in (chunk,) if prefill_chunk else [max(1, chunk >> halved) for halved in range(HALVED + 1)]:
        try:
            placed = elsewhere(piece)
            break
        except BudgetError as error:
            short = error
    else:
        raise short
    balanced = min(_balanced_chunk(placed, machine), context * batch) // batch
    if prefill_chunk is None and balanced > chunk:
        with suppress(BudgetError):
            larger = elsewhere(balanced)
            if larger.expected_decode_tokens_per_s > (1 - MOST_LOST) * placed.expected_decode_tokens_per_s:
                return larger
    return placed


def _with_some_elsewhere(
    planned: Planned, source: Source, machine: Machine, dtype: torch.dtype, chunk: int
) -> Placement:
    """The placement for pieces of `chunk` tokens where some experts fit on no GPU.

    The embedding makes room for experts, in host memory for so much less of them, if it is larger than one.
    """
    model, config = model_bytes(source, dtype), source.config
    everything = model.record_bytes * config.num_hidden_layers * config.num_experts
    most = everything if machine.host_bytes is None else min(everything, machine.host_bytes)
    moved = model.movable_bytes if machine.host_bytes is None or machine.host_bytes >= model.movable_bytes else 0
    errors: dict[int, BudgetError] = {}
    for tried in sorted({0, moved}, reverse=moved >= model.record_bytes):
        try:
            # Pinned memory takes some on the GPUs: first as if as much as possible were pinned, then so much as is.
            first = planned(chunk, most, tried)
            second = planned(chunk, first.host_bytes - tried, tried)
            return second if second.host_bytes <= first.host_bytes else first
        except BudgetError as error:
            errors[tried] = error
    raise errors[moved] if isinstance(errors[moved], GpuShortage) else errors[0]


def _balanced_chunk(placed: Placement, machine: Machine) -> int:
    """Tokens whose work in a layer takes as long as the copies of the experts that the layer misses, on average."""
    missing = sum(map(len, placed.pinned)) + sum(map(len, placed.disk))
    copy_s = missing / len(placed.pinned) * placed.record_bytes / machine.copy_bytes_per_s
    return min(-(-int(copy_s / PREFILL_S) // PREFILL_CHUNK_CUDA) * PREFILL_CHUNK_CUDA, MOST_CHUNK)


def _planned(
    source: Source,
    machine: Machine,
    dtype: torch.dtype,
    context: int,
    batch: int,
    gpu_memory: int | Sequence[int] | None,
    counts: Sequence[Sequence[int]] | None,
    slots: int | None,
    chunk: int,
    pinned: int,
    moved: int,
) -> Placement:
    """The placement for pieces of `chunk` tokens if `pinned` bytes of host memory are mapped, and `moved` others are
    those of the embedding."""
    config = source.config
    if machine.host_bytes is not None:
        machine = replace(machine, host_bytes=machine.host_bytes - moved)
    limits, total = _limits(machine.gpus, gpu_memory)
    shares = shares_of(config.num_hidden_layers, config.num_experts, counts)
    needed = chances(shares, config.experts_per_token, batch)
    slots = SLOT_SETS * config.experts_per_token if slots is None else slots

    def splitter(context: int) -> Splitter:
        demand = Demand.of(source, dtype, context, batch, chunk, pinned, moved)
        used = [
            nbytes + sum(row) * demand.model.record_bytes + caches + 2 * states  # a state is read and written
            for nbytes, row, caches, states in zip(
                demand.model.layers, needed, _steps(demand.caches), _steps(demand.states), strict=True
            )
        ]
        step_bytes = tuple(accumulate(used, initial=0.0))
        tail = demand.model.tail_bytes
        return Splitter(machine.gpus, demand, shares, config.num_experts, slots, step_bytes, tail)

    planner = splitter(context)
    numbers = range(1, min(len(machine.gpus), config.num_hidden_layers) + 1)
    splits = [split for n in numbers if (split := planner.best(n, limits, total)) is not None]
    if not splits:
        raise gpu_shortage(splitter, limits, total, context, batch)
    choices = batch * config.experts_per_token
    found = [_placed(planner, split, machine, needed, choices, (context, batch, chunk), dtype) for split in splits]
    placements = [placement for placement in found if placement is not None]
    if not placements:
        raise host_shortage(planner, splits, machine, STAGING_RECORDS)
    return max(placements, key=lambda placed: (placed.expected_hit_rate, placed.expected_decode_tokens_per_s))


def _limits(gpus: Sequence[Gpu], gpu_memory: int | Sequence[int] | None) -> tuple[tuple[int, ...], int | None]:
    """The most bytes on each GPU, and on all of them."""
    if not gpus:
        raise ConfigError("a placement needs at least one GPU")
    sizes = tuple(gpu.memory_bytes for gpu in gpus)
    if gpu_memory is None or isinstance(gpu_memory, int):
        return sizes, gpu_memory
    if len(gpu_memory) != len(gpus):
        raise ConfigError(f"{len(gpu_memory)} budgets for {len(gpus)} GPUs: give one for each, or one for all together")
    return tuple(map(min, sizes, gpu_memory)), None


def _steps(sums: Sequence[int]) -> list[int]:
    return [after - before for before, after in pairwise(sums)]


def _placed(
    planner: Splitter,
    split: Split,
    machine: Machine,
    needed: Sequence[Sequence[float]],
    choices: int,
    run: tuple[int, int, int],
    dtype: torch.dtype,
) -> Placement | None:
    """The placement for a split; None if the experts left over fit neither in host memory nor on disk."""
    record = planner.demand.model.record_bytes
    devices = tuple(_device(planner, split, index) for index in range(len(split.budgets)))
    resident = {(layer, e) for d in devices for layer, ids in zip(d.layers, d.resident, strict=True) for e in ids}
    missing = [expert for expert in planner.shares.hottest(0, planner.layers) if expert not in resident]
    staging = STAGING_RECORDS * len(devices)  # every GPU's store has buffers of its own
    pinned = pinned_number(len(missing), machine, record, staging)
    if pinned is None:
        return None
    in_host, on_disk = (_by_layer(part, planner.layers) for part in (missing[:pinned], missing[pinned:]))
    context, batch, chunk = run
    host_bytes = (pinned + (staging if pinned < len(missing) else 0)) * record
    read = _read_in_place(in_host, on_disk, choices, len(needed[0]))
    copied = [() if here else ids for here, ids in zip(read, in_host, strict=True)]
    missed = Missed(
        in_place=summed(needed, read),
        copied=summed(needed, copied),
        on_disk=summed(needed, on_disk),
        pauses=sum(bool(host or disk) for host, disk in zip(copied, on_disk, strict=True)),
    )
    division, computed, saved_s = _divided(needed, read, host_bytes, batch, record, machine)
    seconds = sum(planner.seconds(i, d.layers.start, d.layers.stop) for i, d in enumerate(devices))
    seconds += HOP_S * (len(devices) - 1) + STEP_S + missed.seconds(record, machine) - saved_s
    return Placement(
        devices=devices,
        pinned=in_host,
        disk=on_disk,
        host_bytes=host_bytes + planner.demand.moved_bytes,
        disk_bytes=(len(missing) - pinned) * record,
        record_bytes=record,
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        batch=batch,
        prefill_chunk=chunk,
        expected_hit_rate=split.held / planner.shares.total,
        expected_decode_tokens_per_s=batch / seconds,
        embedding_bytes=planner.demand.moved_bytes,
        computed=computed,
        division=division,
    )


def _read_in_place(in_host: Ids, on_disk: Ids, choices: int, experts: int) -> Ids:
    """Those of `in_host` that a step of so many choices a layer reads there."""
    return tuple(
        host if not disk and worthwhile(choices, len(host), experts) else ()
        for host, disk in zip(in_host, on_disk, strict=True)
    )


def _divided(
    needed: Sequence[Sequence[float]], read: Ids, host_bytes: int, batch: int, record_bytes: int, machine: Machine
) -> tuple[Division | None, tuple[Expert, ...], float]:
    """How experts that are read in place are divided with the CPU, which ones, and the seconds that a step gains by it:
    nothing where none are to be gained. Those that several sequences need are not divided.

    Where host memory is short, a little of many saves about as much as more of fewer, and leaves the CPU time to spare.
    """
    found: list[tuple[Division | None, tuple[Expert, ...], float]] = [(None, (), 0.0)]
    for division, keys in divisions(read, host_bytes, machine) if batch == 1 else ():
        divided = sum(needed[layer][expert] for layer, expert in keys)
        found.append((division, keys, saved_seconds(divided, division, record_bytes, machine)))
    most = max(saved_s for _, _, saved_s in found)
    return [way for way in found if way[2] >= ABOUT * most][-1]


def _device(planner: Splitter, split: Split, index: int) -> DevicePlan:
    start, stop = split.bounds[index : index + 2]
    resident = planner.resident(start, stop, split.room[index])
    assert resident is not None
    hottest = planner.shares.hottest(start, stop)[:resident]
    return DevicePlan(
        device=planner.gpus[index].device,
        budget_bytes=split.budgets[index],
        layers=range(start, stop),
        resident=_by_layer(((layer - start, expert) for layer, expert in hottest), stop - start),
        slots=planner.slots(start, stop, resident),
        record_bytes=planner.demand.model.record_bytes,
        **planner.demand.parts(start, stop),
    )


def pinned_number(missing: int, machine: Machine, record_bytes: int, staging: int) -> int | None:
    """How many of the missing experts host memory takes, the others being on disk; None if that cannot be.

    With some on disk `staging` records of host memory are buffers.
    """
    room = missing if machine.host_bytes is None else machine.host_bytes // record_bytes
    if room >= missing:
        return missing
    if machine.disk_bytes is None or room < staging:
        return None
    pinned = room - staging
    return pinned if (missing - pinned) * record_bytes <= machine.disk_bytes else None


def _by_layer(experts: Iterable[Expert], layers: int) -> Ids:
    """Ids for each layer, those that come first in `experts` first."""
    ids: list[list[int]] = [[] for _ in range(layers)]
    for layer, expert in experts:
        ids[layer].append(expert)
    return tuple(map(tuple, ids))
