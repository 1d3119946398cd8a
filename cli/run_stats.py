"""What a run was like, for `minibble run --stats`: speed, memory, experts, and how steps went through the layers."""

from typing import TYPE_CHECKING, Any

from minibble.cli.output import duration
from minibble.quantize.sizes import decimal

if TYPE_CHECKING:
    from minibble.runtime.generation import GenerationResult
    from minibble.runtime.plan import MemoryPlan
    from minibble.runtime.planning.placement import Placement


def lines(model: Any, load_s: float, result: "GenerationResult", plan: "MemoryPlan | Placement") -> list[str]:
    """Everything that is known of a reply."""
    prefill, decode = result.prefill_tokens_per_s, result.decode_tokens_per_s
    return [
        f"loaded in {duration(load_s)} on {', '.join(map(str, model.devices))}",
        f"prompt {result.prompt_tokens} tokens, {f'{prefill:.1f} tokens/s' if prefill else 'not measured'}",
        f"new    {result.new_tokens} tokens, {f'{decode:.1f} tokens/s' if decode else 'not measured'}",
        *steps(result.decode_path),
        *_memory(model, plan),
        *map(_experts, model.stores),
    ]


def _memory(model: Any, plan: "MemoryPlan | Placement") -> list[str]:
    """Of each GPU what was planned, what its driver counts, and what that is made of."""
    planned = {device.device: device.total_bytes for device in getattr(plan, "devices", ())}
    gpus = model.memory_report()["measured"].get("gpus", ()) if model.checkpoint is not None else ()
    return [
        f"{gpu['device']}: in use {decimal(gpu['driver_bytes'])}"
        + (f", planned {decimal(planned[gpu['device']])}" if gpu["device"] in planned else "")
        + f"; tensors {decimal(gpu['allocated_bytes'])} at most, the allocator's reserve "
        f"{decimal(gpu['reserved_bytes'] - gpu['allocated_bytes'])}, CUDA and other processes "
        f"{decimal(gpu['driver_bytes'] - gpu['reserved_bytes'])}"
        for gpu in gpus
    ]


def _experts(store: Any) -> str:
    stats = store.stats
    return (
        f"experts on {store.device}: {stats.hits} hits, {stats.misses} misses ({100 * stats.hit_rate:.1f} % hits), "
        f"{stats.computed} of them computed by the CPU in part, {stats.in_place} read in host memory; "
        f"{decimal(stats.bytes_from_host)} came from host memory, {decimal(stats.bytes_from_disk)} from disk; "
        f"{stats.predicted_right} of {stats.prefetched} fetched early were right; waited {stats.stall_s:.2f} s on the "
        f"host, {stats.device_stall_s:.2f} s on the GPU"
    )


def steps(taken: dict[str, int]) -> list[str]:
    """How decode steps went through the layers, in words: replayed, launched, or why neither."""
    graph, eager = taken.get("graph", 0), taken.get("eager", 0)
    lines = [f"steps  {graph} replayed from CUDA graphs, {eager} launched one by one"] if graph or eager else []
    reasons = ((reason, count) for reason, count in taken.items() if reason not in ("graph", "eager"))
    return lines + [f"steps  {count} without CUDA graphs ({reason})" for reason, count in reasons]
