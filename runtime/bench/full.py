"""The whole model with random weights, placed as a plan says: what it takes, and how many tokens a second it gives.

Rates come from the model's own `forward` and `generate()`, Python and sampling included. Tokens are sampled from
nearly uniform logits, so that every one goes its own way through the experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import BudgetError, ConfigError
from minibble.runtime.bench import routing
from minibble.runtime.bench.layers import fill_randomly, random_state, real_config
from minibble.runtime.bench.tables import WARM_STEPS
from minibble.runtime.bench.whole import check_layers, check_offloaded
from minibble.runtime.devices import gpu_bytes
from minibble.runtime.experts import division
from minibble.runtime.measured import measured_machine
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.planning.device_bytes import ConfigSource
from minibble.runtime.planning.placement import Placement
from minibble.runtime.planning.planner import plan_placement
from minibble.runtime.unfilled import Unfilled

REPEATS = 3  # of a prefill
COUNTED = 1_000_000  # tokens of a calibration that would have found the shares of `routing.zipf_shares`

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What is asked for: `context` tokens before those decoded, for each number of sequences in `batches`."""

    format: str = "nf4-dq"
    gpu_memory: int | None = None
    host_memory: int | None = None
    folder: Path | None = None
    cpu_experts: bool = False
    routing: str = "uniform"
    context: int = 8192
    batches: tuple[int, ...] = (1,)
    steps: int = 64
    prompt: int = 8192  # tokens; 0 for none
    prefill_chunk: int | None = None


def gate(
    devices: Sequence[torch.device], format: str, progress: Progress, cpu_experts: bool = False
) -> dict[str, float]:
    """Errors of two layers of the released size, the second on the last device; WrongResult if they are too large.

    With experts off the GPU the logits must be the same to the bit, but for rounding with `cpu_experts`.
    """
    progress("comparing two layers with the reference kernels")
    source = ConfigSource.of(real_config((0, 1)), format)
    if source.format is None:
        raise ConfigError(f"format {format}: dummy weights are for 4-bit formats")
    errors = check_layers(source.config, source.format, [devices[0], devices[-1]])
    return errors | check_offloaded(source, devices[-1], cpu_experts)


def measure(config: ModelConfig, devices: Sequence[torch.device], run: Run, progress: Progress) -> dict[str, Any]:
    """The plan, what loading took, and for every number of sequences and for a prompt: rates and bytes.

    Batches that the plan has no memory for are named as such.
    """
    source = ConfigSource.of(config, run.format)
    lengths, counts = _routing(config, run.routing)
    longest = max(run.context + run.steps + WARM_STEPS, run.prompt)
    machine = measured_machine(source, devices, torch.bfloat16, run.host_memory, run.folder, run.cpu_experts)
    placement = plan_placement(
        source, machine, context=longest, gpu_memory=run.gpu_memory,
        counts=counts, prefill_chunk=run.prefill_chunk,
    )  # fmt: skip
    division.warn_unless_planned(machine, placement)
    used = [torch.device(plan.device) for plan in placement.devices]
    progress(f"placing {sum(map(len, placement.resident))} of {config.num_hidden_layers * config.num_experts} experts")
    for device in used:
        torch.cuda.reset_peak_memory_stats(device)
    started = perf_counter()
    unfilled = Unfilled.placed(source, placement, run.folder, run.gpu_memory is not None)
    try:
        model = fill_randomly(unfilled, logits_LE=lengths)
        by_noise = run.routing != "uniform" or bool(model.stores)
        if by_noise:
            _route_by_noise(model)
        _synchronize(model)
        result: dict[str, Any] = {
            "plan": placement.to_json(),
            "routing": run.routing,
            "routed_by": "noise" if by_noise else "hidden states",
            "load_s": perf_counter() - started,
            "loaded": [gpu_bytes(device) for device in used],
            "decode": [],
        }
        with torch.inference_mode():
            for batch in run.batches:
                progress(f"decoding {batch} × {run.steps} tokens")
                result["decode"].append(_decode(model, placement, source, batch, run))
            if run.prompt:
                progress(f"a prompt of {run.prompt} tokens")
                result["prefill"] = prefill_rate(model, run.prompt) | {"memory": [gpu_bytes(d) for d in used]}
    finally:
        unfilled.close()
    return result


def _routing(config: ModelConfig, law: str) -> tuple[Tensor | None, list[list[int]] | None]:
    """Standard deviations of the routers' logits [L, E], and the counts that a calibration would have given."""
    if law == "uniform":
        return None, None
    L, E, A = config.num_hidden_layers, config.num_experts, config.experts_per_token
    ranks = routing.ranks(L, E)
    counts = (COUNTED * routing.zipf_shares(E, A)).long()[ranks].tolist()
    return routing.row_lengths(E, A)[ranks], counts


def _route_by_noise(model: MiniMaxForCausalLM) -> None:
    """Where it matters which experts come: every token of every layer has its own."""
    for index, device in enumerate(model.devices):
        generator = torch.Generator(device).manual_seed(index)
        shape = (routing.NOISE_ROWS, model.minibble.hidden_size)
        noise = torch.randn(shape, dtype=model.dtype, device=device, generator=generator)
        for layer in model.layers:
            if layer.device == device:
                layer.moe.route = routing.by_noise(layer.moe.route, noise)


def _decode(
    model: MiniMaxForCausalLM, placement: Placement, source: ConfigSource, batch: int, run: Run
) -> dict[str, Any]:
    resized = placement.resized(source, run.context + run.steps + WARM_STEPS, batch)
    try:
        resized.check()
    except BudgetError as error:
        return {"batch": batch, "context": run.context, "refused": str(error)}
    before = [store.stats for store in model.stores]
    found = decode_rate(model, batch, run.context, run.steps)
    used = [torch.device(plan.device) for plan in placement.devices]
    found["memory"] = [gpu_bytes(device) for device in used]
    found["experts"] = [store.stats.since(old).to_json() for store, old in zip(model.stores, before, strict=True)]
    found["predicted_bytes"] = [plan.total_bytes for plan in resized.devices]
    return found


class Clock(BaseStreamer):
    """When each token reached the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def prefill_rate(model: MiniMaxForCausalLM, tokens: int) -> dict[str, Any]:
    """Seconds and tokens a second of a prompt of `tokens` random ids, the median of a few."""
    ids = _random_ids(model, 1, tokens)
    times = []
    for repeat in range(REPEATS + 1):
        _synchronize(model)
        started = perf_counter()
        model(ids, use_cache=True, logits_to_keep=1).logits.cpu()
        if repeat:  # the first compiles
            times.append(perf_counter() - started)
    elapsed_s = median(times)
    return {"tokens": tokens, "chunk": model.prefill_chunk, "seconds": elapsed_s, "tokens_per_s": tokens / elapsed_s}


def decode_rate(model: MiniMaxForCausalLM, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Tokens a second over `steps` tokens of each of `batch` sequences after `context` random ones."""
    state = random_state(model, batch, context, room=steps + WARM_STEPS + 2)
    clock, total = Clock(), steps + WARM_STEPS
    before = model.decode_path()
    with torch.inference_mode():
        out = model.generate(
            _random_ids(model, batch, context + 1), past_key_values=state, streamer=clock, do_sample=True,
            temperature=1.0, top_k=0, max_new_tokens=total, min_new_tokens=total, pad_token_id=0,
        )  # fmt: skip
    _, *times = clock.times  # the prompt comes first
    assert out.shape == (batch, context + 1 + total) and len(times) == total
    gaps = [after - earlier for earlier, after in zip(times[WARM_STEPS - 1 :], times[WARM_STEPS:], strict=False)]
    path = {way: count - before.get(way, 0) for way, count in model.decode_path().items()}
    return {
        "batch": batch,
        "context": context,
        "steps": len(gaps),
        "tokens_per_s": batch * len(gaps) / sum(gaps),
        "median_step_ms": 1e3 * median(gaps),
        "distinct_tokens": int(out[:, context + 1 :].unique().numel()),
        "decode_path": {way: count for way, count in path.items() if count},
    }


def _random_ids(model: MiniMaxForCausalLM, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(model.minibble.vocab_size, (batch, tokens), generator=generator).to(model.device)


def _synchronize(model: MiniMaxForCausalLM) -> None:
    for device in model.devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
