"""minibble models with the weights that the oracles get, and the oracles' answers, each made once a session."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import float64_loop, tiny, transformers_oracle
from torch import Tensor

from minibble.quantize.config import ModelConfig
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.state import HybridState

BOUND = 1e-4  # of the largest logit; float32 gives about 3e-6


def config_of(spelling: str = "hf", **changes: Any) -> ModelConfig:
    """The tiny model's config; `changes` are keys of the Hugging Face spelling that both spellings share."""
    raw = tiny.original_json(**changes) if spelling == "original" else tiny.hf_json(**changes)
    return ModelConfig.from_dict(raw)


def fill(model: Any, weights: dict[str, Tensor]) -> Any:
    """Give `model` the weights of the oracles, each exactly once; returns the model in eval mode."""
    left = dict(weights)
    with torch.no_grad():
        for name, view in model.named_weights():
            view.copy_(left.pop(name))
    assert not left, f"the model has no place for {sorted(left)}"
    return model.eval()


def make(spelling: str = "hf", dtype: torch.dtype = torch.float32, seed: int = 3, **changes: Any) -> MiniMaxForCausalLM:
    """A new tiny model, `dtype`, with `tiny.random_weights(seed)`."""
    config = config_of(spelling, **changes)
    model = MiniMaxForCausalLM.random(config, dtype=dtype, seed=0)
    return fill(model, tiny.random_weights(tiny.plain_config(**changes), seed))


@torch.no_grad()
def prefilled(model: MiniMaxForCausalLM, ids: Tensor, mask: Tensor | None = None, reserve: int = 64) -> HybridState:
    state = HybridState(model.minibble, reserve=reserve)
    model(ids, mask, past_key_values=state)
    return state


@torch.no_grad()
def follow(model: MiniMaxForCausalLM, state: HybridState, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of further tokens, one after the other; `mask` [B, past + T] if it is to be given."""
    past, logits = state.length, []
    for t in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : past + t + 1]
        logits.append(model(ids[:, t : t + 1], seen, past_key_values=state).logits)
    return torch.cat(logits, dim=1)


def followed(model: MiniMaxForCausalLM, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a prompt, the first of `ids` [B, T], and of the tokens after it, one by one."""
    state = HybridState(model.minibble, reserve=ids.shape[1])
    with torch.no_grad():
        first = model(ids[:, :prompt], mask, past_key_values=state).logits
    return torch.cat((first, follow(model, state, ids[:, prompt:])), dim=1)


_LOGITS: dict[str, Tensor] = {}


def loop_logits(prompt: Sequence[int], mutation: str | None = None, seed: int = 3, **changes: Any) -> Tensor:
    """Float64 logits [T, V] of the loop; each is computed once a session."""
    key = repr((list(prompt), mutation, seed, sorted(changes.items())))
    if key not in _LOGITS:
        config = tiny.plain_config(**changes)
        loop = float64_loop.Loop(config, tiny.random_weights(config, seed), mutation)
        _LOGITS[key] = loop.run(prompt)
        told = mutation is not None or loop.closest_gap > 2e-5
        assert told, "experts are chosen by less than float32 can tell: take other prompts"
    return _LOGITS[key]


def transformers_logits(prompts: list[list[int]], seed: int = 3, **changes: Any) -> list[Tensor]:
    """Float32 logits [T, V] of each prompt from transformers' mended port."""
    config = tiny.plain_config(**changes)
    return transformers_oracle.logits(config, tiny.random_weights(config, seed), prompts)


def error(found: Tensor, reference: Tensor) -> float:
    """max |found - reference| / max |reference|; infinite where found has NaN."""
    assert found.shape == reference.shape, f"{tuple(found.shape)} against {tuple(reference.shape)}"
    difference = (found.double() - reference.double()).abs().max()
    return float(difference / reference.double().abs().max()) if found.isfinite().all() else float("inf")


def shared_model(name: str = "reference-a") -> Path:
    """Folder of a trained reference model outside the repository; skips the test where there is none."""
    default = Path(__file__).resolve().parents[3] / "shared"
    folder = Path(os.environ.get("MINIBBLE_SHARED", default)) / "models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no trained model {name}: set MINIBBLE_SHARED to the folder that holds models/{name}")
    return folder
