"""How good a checkpoint is: perplexity on a text, and how far its predictions are from its source's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.runtime.devices import the_devices
from minibble.runtime.loading import load
from minibble.runtime.model import MiniMaxForCausalLM

SCORED = 64  # positions at a time: their logits over the vocabulary are 51 MB a model, those of a window 410

OnWindow = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Evaluation:
    """Figures over `tokens` predicted tokens; those against a source are None without one.

    `kl` is the mean KL divergence from the source's distribution to the checkpoint's, in nats per token;
    `top1_agreement` the share of tokens at which both find the same id likeliest.
    """

    tokens: int
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None
    source_perplexity: float | None = None


def evaluate(
    checkpoint: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    *,
    seq_len: int = 512,
    max_windows: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    offload_folder: Path | None = None,
    cpu_experts: bool = False,
    progress: OnWindow | None = None,
) -> Evaluation:
    """Score `checkpoint` on the file `text`, cut into windows of `seq_len` tokens that start afresh.

    With `against`, the 16-bit source, both models see the same windows. `dtype` of the activations defaults to
    float32 on CPUs and bfloat16 on GPUs. Each model is loaded whole, one beside the other; `device`, `gpu_memory`,
    `host_memory` and `offload_folder` place the checkpoint, as `load` says.
    """
    first = the_devices(device)[0]
    chosen = dtype or (torch.bfloat16 if first.type == "cuda" else torch.float32)
    source = None if against is None else load(against, device=first, dtype=chosen)  # first: what is left is planned
    model = load(
        checkpoint, gpu_memory, device, chosen, context=seq_len, host_memory=host_memory,
        offload_folder=offload_folder, cpu_experts=cpu_experts,
    )  # fmt: skip
    try:
        return _compared(model, source, checkpoint, against, Path(text), seq_len, max_windows, progress)
    finally:
        model.close()


def _compared(
    model: MiniMaxForCausalLM,
    source: MiniMaxForCausalLM | None,
    checkpoint: str | Path,
    against: str | Path | None,
    text: Path,
    seq_len: int,
    max_windows: int | None,
    progress: OnWindow | None,
) -> Evaluation:
    if source is not None and source.minibble.vocab_size != model.minibble.vocab_size:
        raise CheckpointError(
            f"{against}: vocabulary of {source.minibble.vocab_size}, but {checkpoint} has {model.minibble.vocab_size}"
        )
    windows = _windows(model, text, seq_len, max_windows)
    sums = torch.zeros(4, dtype=torch.float64)
    for done, window in enumerate(windows, start=1):
        sums += _score(model, source, window.to(model.device))
        if progress is not None:
            progress(done, len(windows))
    return _evaluation(sums, len(windows) * (windows[0].shape[0] - 1), source is not None)


def _windows(model: MiniMaxForCausalLM, text: Path, seq_len: int, limit: int | None) -> list[Tensor]:
    if seq_len < 2:
        raise ConfigError(f"windows of {seq_len} tokens predict nothing: take at least 2")
    if limit is not None and limit < 1:
        raise ConfigError(f"{limit} windows are nothing to score: take at least 1")
    if model.tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer.json, so text cannot be scored")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: cannot be read as text ({error})") from error
    ids = torch.tensor(model.tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
    windows = list(ids[: len(ids) // seq_len * seq_len].view(-1, seq_len))[:limit]
    if not windows:
        raise ConfigError(f"{text}: {len(ids)} tokens are less than one window of {seq_len}")
    return windows


@torch.no_grad()
def _score(model: MiniMaxForCausalLM, source: MiniMaxForCausalLM | None, window: Tensor) -> Tensor:
    """Sums over a window [T]: its own loss, the source's loss, KL, agreements; float64 [4]."""
    sums, states = torch.zeros(4, dtype=torch.float64), [m.hidden(window[None])[0, :-1] for m in (model, source) if m]
    for start in range(0, len(window) - 1, SCORED):
        part = slice(start, start + SCORED)
        sums += _score_part(model, source, [h[part] for h in states], window[1:][part, None])
    return sums


def _score_part(
    model: MiniMaxForCausalLM, source: MiniMaxForCausalLM | None, hidden: list[Tensor], target: Tensor
) -> Tensor:
    """The sums for a few positions, whose tokens to come are `target` [T, 1]."""
    own = model.head(hidden[0], out_dtype=torch.float32).to(target.device).log_softmax(-1)
    loss = -own.gather(1, target).double().sum()
    if source is None:
        return torch.tensor([loss.item(), 0, 0, 0], dtype=torch.float64)
    theirs = source.head(hidden[1], out_dtype=torch.float32).to(target.device).log_softmax(-1)
    kl = (theirs.exp() * (theirs - own)).double().sum()
    agree = (own.argmax(-1) == theirs.argmax(-1)).sum()
    source_loss = -theirs.gather(1, target).double().sum()
    return torch.stack((loss, source_loss, kl, agree.double())).cpu()


def _evaluation(sums: Tensor, tokens: int, compared: bool) -> Evaluation:
    loss, source_loss, kl, agree = (sums / tokens).tolist()
    if not compared:
        return Evaluation(tokens, math.exp(loss))
    return Evaluation(tokens, math.exp(loss), kl, agree, math.exp(source_loss))
