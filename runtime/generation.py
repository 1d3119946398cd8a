"""Text from a prompt, streamed as it comes, with prefill and decode timed apart.

Around transformers' `generate()`; a loaded model brings its tokenizer as `model.tokenizer`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from minibble.quantize.errors import CheckpointError, ConfigError

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in.

    A `seed` sets torch's global generators, so that the same call gives the same text again.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: expected a temperature "
                "of at least 0, top_p above 0 and at most 1, top_k of at least 0"
            )


@dataclass(frozen=True)
class GenerationResult:
    """New text, its tokens, and how long it took.

    `prompt_tokens` are those that had to be fed; `ended` tells that the last token is one that ends a text;
    `state` holds all tokens but the last. `decode_path` counts how its tokens went through the layers, as the model's
    `decode_path()` does.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    ended: bool
    state: Any = field(default=None, repr=False, compare=False)
    decode_path: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens over the time to the first new one."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens after the first, over the time they took; None if there were none."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None


class _TimedStreamer(TextStreamer):
    """Hands on text as words form, and notes when the prompt, the first and the latest token passed by.

    `generate()` copies each token to the host before it calls `put`, so the times include all the device's work.
    """

    def __init__(self, tokenizer: Any, on_text: OnText | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.on_text is not None:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text and self.on_text is not None:
            self.on_text(text)

    def elapsed(self) -> tuple[float, float]:
        """Seconds of prefill (prompt to first token) and of decode (first to last token)."""
        prompt, *tokens = self.times
        return (tokens[0] - prompt, tokens[-1] - tokens[0]) if tokens else (0.0, 0.0)


def require_tokenizer(model: Any) -> Any:
    """The model's tokenizer; CheckpointError if its checkpoint had none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer: tokenizer.json is missing beside its weights")
    return tokenizer


def encode(model: Any, text: str) -> list[int]:
    """Token ids of a plain prompt; ConfigError if there are none."""
    ids = list(require_tokenizer(model).encode(text))
    if not ids:
        raise ConfigError("the prompt is empty")
    return ids


def generate_text(
    model: Any,
    ids: list[int],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    on_text: OnText | None = None,
    state: Any = None,
    stop_ids: Iterable[int] = (),
) -> GenerationResult:
    """Continue `ids`, the whole sequence so far, by at most `max_new_tokens`.

    `on_text` gets each piece of new text as soon as it is certain. `state` is the `.state` of an earlier result
    for a beginning of `ids`: only the tokens after it are fed. Generation ends at the model's end-of-text tokens
    and at any of `stop_ids`; these are in `token_ids` but not in the text.
    """
    tokenizer = require_tokenizer(model)
    sampling = sampling or Sampling()
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    fed = 0 if state is None else int(state.get_seq_length())
    ends = end_of_text_ids(model, tokenizer) | set(stop_ids)
    input_ids = torch.tensor([ids], dtype=torch.long, device=model.device)
    streamer, taken = _TimedStreamer(tokenizer, on_text), Counter(model.decode_path())
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=_generation_config(tokenizer, max_new_tokens, sampling, ends),
        streamer=streamer,
        **({} if state is None else {"past_key_values": state}),
    )
    new_ids = output.sequences[0, len(ids) :].tolist()
    prefill_s, decode_s = streamer.elapsed()
    return GenerationResult(
        text=tokenizer.decode(new_ids, skip_special_tokens=True),
        token_ids=tuple(new_ids),
        prompt_tokens=len(ids) - fed,
        prefill_s=prefill_s,
        decode_s=decode_s,
        ended=bool(new_ids) and new_ids[-1] in ends,
        state=output.past_key_values,
        decode_path=dict(Counter(model.decode_path()) - taken),
    )


def _generation_config(tokenizer: Any, max_new_tokens: int, sampling: Sampling, ends: set[int]) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    # Set even where they have no effect: what is left out is taken from the model's own generation config.
    settings: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
        return_dict_in_generate=True,
        **settings,
    )


def end_of_text_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, by the generation config, the model's config and the tokenizer."""
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return ends
