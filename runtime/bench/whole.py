"""Whole layers: are they right, and where does their time go. B batch, T tokens, V vocabulary."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.config import ModelConfig
from minibble.quantize.formats import Format
from minibble.runtime.bench.check import WrongResult, kernels
from minibble.runtime.bench.gpu import poisoned
from minibble.runtime.bench.layers import fill_randomly, random_model
from minibble.runtime.decode import Inputs, decode_step
from minibble.runtime.devices import this_machine
from minibble.runtime.experts.division import division_at, unit_step
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.plan import PREFILL_CHUNK_CUDA
from minibble.runtime.planning.device_bytes import ConfigSource
from minibble.runtime.planning.planner import plan_placement
from minibble.runtime.state import HybridState
from minibble.runtime.unfilled import Unfilled

BOUND = 2e-2  # relative error of a token's logits after two layers whose activations are bfloat16 on both sides
OTHER_EXPERTS = 0.1  # share of tokens that rounding may send to other experts, which makes their logits others


def check_layers(
    config: ModelConfig,
    format: Format,
    device: torch.device | Sequence[torch.device],
    prompt: tuple[int, int] = (16, 40),
) -> dict[str, float]:
    """Errors of the logits of a prompt [B, T] and of a decoded token after it, against the reference kernels.

    `device` is that of all layers, or one for each. Both models have the same weights. WrongResult if more tokens than
    OTHER_EXPERTS are off by more than BOUND.
    """
    B, T = prompt
    ids = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    with kernels("reference"):
        expected = _logits(random_model(config, format, device), ids, fused=False)
    with kernels(""):
        model = random_model(config, format, device)
        with poisoned():
            found = _logits(model, ids, fused=True)
    return {
        "prefill": _error("prefill", found[:, :T], expected[:, :T]),
        "decode": _error("decode", found[:, T:], expected[:, T:]),
    }


def check_offloaded(
    source: ConfigSource, device: torch.device, divided: bool = False, tokens: tuple[int, int] = (700, 12)
) -> dict[str, float]:
    """WrongResult unless logits are the same to the bit with a third of the experts off the GPU.

    Those of a prompt, and of tokens after it that go through graphs once these are captured; of three sequences, and of
    one, for which experts are read in place. Then with experts `divided`, of which the CPU computes a quarter: for one
    sequence's tokens the error returned, which may be as large as BOUND for most of them.
    """
    machine, (T, steps) = this_machine([device]), tokens
    whole = plan_placement(source, machine, context=T + steps, prefill_chunk=PREFILL_CHUNK_CUDA)
    less = whole.record_bytes * sum(map(len, whole.resident)) // 3
    some = plan_placement(
        source, machine, context=T + steps, gpu_memory=whole.total_bytes - less, prefill_chunk=PREFILL_CHUNK_CUDA
    )
    assert not whole.devices[0].slots and some.devices[0].slots, "nothing is off the GPU"
    ids = torch.randint(source.config.vocab_size, (3, T + steps), generator=torch.Generator().manual_seed(1))
    found = [_followed(Unfilled.placed(source, placement), ids.to(device), T) for placement in (whole, some)]
    if not torch.equal(*found):
        off = (found[0] != found[1]).any(dim=-1).float().mean()
        raise WrongResult(f"with experts off the GPU the logits of {off:.0%} of the tokens are others")
    if not divided:
        return {}
    assert source.format is not None
    step = unit_step(source.format)
    quarter = source.config.intermediate_size // 4 // step * step
    helped = plan_placement(
        source, replace(machine, division=division_at(source, quarter)), context=T + steps,
        gpu_memory=whole.total_bytes - less, prefill_chunk=PREFILL_CHUNK_CUDA,
    )  # fmt: skip
    assert helped.computed, "the CPU has no part of any expert"
    ours = _followed(Unfilled.placed(source, helped), ids.to(device), T)[-1, -steps:]
    right = found[0][-1, -steps:]
    error = float(((ours - right).norm(dim=-1) / right.norm(dim=-1)).median())
    if not error <= BOUND:
        raise WrongResult(
            f"with parts of experts on the CPU logits are off by {error:.1e}, at most {BOUND:.0e} allowed"
        )
    return {"divided": float(f"{error:.3g}")}


def _followed(unfilled: Unfilled, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last tokens of a prompt, and of those that follow one by one: of all, then of the first again."""
    try:
        model, logits = fill_randomly(unfilled), []
        with torch.inference_mode():
            for some in (ids, ids[:1]):
                state = HybridState(model.minibble, reserve=ids.shape[1])
                new = [model(some[:, :prompt], past_key_values=state, logits_to_keep=64).logits]
                new += [model(some[:, t : t + 1], past_key_values=state).logits for t in range(prompt, ids.shape[1])]
                logits.append(torch.cat(new, dim=1))
        path = model.decode_path()
        assert path.get("graph", 0) > path.get("eager", 0), f"steps went another way: {path}"
        return torch.cat(logits)
    finally:
        unfilled.close()


def _logits(model: MiniMaxForCausalLM, ids: Tensor, fused: bool) -> Tensor:
    """Logits [B, T + 1, V] of the prompt and of one token after it, which goes through `decode_step` if `fused`."""
    ids, T, state = ids.to(model.device), ids.shape[1] - 1, HybridState(model.minibble, reserve=ids.shape[1])
    first = model(ids[:, :T], past_key_values=state).logits
    if fused:
        inputs = step_inputs(model, ids[:, T], state)
        return torch.cat([first, decode_step(model, inputs, state)[:, None].to(first.device)], dim=1)
    return torch.cat([first, model(ids[:, T:], past_key_values=state).logits], dim=1)


def step_inputs(model: MiniMaxForCausalLM, ids_B: Tensor, state: HybridState) -> Inputs:
    """What `decode_step` reads for the tokens `ids_B` after all that `state` has seen."""
    inputs = Inputs.empty(model, len(ids_B), state.capacity)
    inputs.put(ids_B, state.length)
    return inputs


def _error(what: str, found: Tensor, expected: Tensor) -> float:
    """The median over tokens of the relative error of their logits."""
    errors = ((found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).flatten()
    off = float((~(errors <= BOUND)).float().mean())  # NaN is off
    if off > OTHER_EXPERTS:
        raise WrongResult(
            f"{what}: the logits of {off:.0%} of the tokens are off by more than {BOUND:.0e} of the reference's, "
            f"at most {OTHER_EXPERTS:.0%} allowed"
        )
    return float(f"{float(errors.median()):.3g}")


def kernel_times_us(call: Callable[[], Any], layers: int) -> dict[str, float]:
    """Microseconds on the GPU of one `call`, by the kernel's name, longest first.

    A kernel that every one of `layers` launches several times is told apart by its place in the layer.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's, of cycles that there are none of
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
    found = [event for event in profiled.events() if event.self_device_time_total > 0]
    launches = [(event.name[:80], event.self_device_time_total) for event in sorted(found, key=_start)]
    return _summed(launches, layers)


def _start(event: Any) -> float:
    return event.time_range.start


def _summed(launches: list[tuple[str, float]], layers: int) -> dict[str, float]:
    """Microseconds by name, and by place where a name comes several times in each of `layers`; longest first."""
    counts, seen = Counter(name for name, _ in launches), Counter[str]()
    times: dict[str, float] = {}
    for name, us in launches:
        each, rest = divmod(counts[name], layers)
        key = name if rest or each < 2 else f"{name} ({seen[name] % each + 1} of {each} in a layer)"
        seen[name] += 1
        times[key] = times.get(key, 0.0) + us
    return {key: round(us, 1) for key, us in sorted(times.items(), key=lambda item: -item[1])}
