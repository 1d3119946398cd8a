"""The whole model at its released size with random weights: what it takes, and how many tokens a second it gives.

Rates come from the model's own `forward` and `generate()`, Python and sampling included. Tokens are sampled from
nearly uniform logits, so that every one goes its own way through the experts.
"""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from minibble.runtime.bench.layers import random_state
from minibble.runtime.model import MiniMaxForCausalLM

REPEATS = 3  # of a prefill
WARM_STEPS = 8  # of decoding that are not timed: the first runs launch by launch, the second captures

Progress = Callable[[str], None]


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


def gpu_bytes(devices: Sequence[torch.device]) -> list[dict[str, Any]]:
    """Of each GPU: bytes in use as the driver counts them, and the most that torch's allocator held and gave out."""
    found = []
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        found.append({
            "device": str(device),
            "driver_bytes": total - free,
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
            "allocated_bytes": torch.cuda.max_memory_allocated(device),
        })  # fmt: skip
    return found


def _random_ids(model: MiniMaxForCausalLM, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(model.minibble.vocab_size, (batch, tokens), generator=generator).to(model.device)


def _synchronize(model: MiniMaxForCausalLM) -> None:
    for device in model.devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
