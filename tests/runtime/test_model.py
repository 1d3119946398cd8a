"""Logits against two oracles that share no code with the model: a float64 loop and transformers' mended port.

Every way through the model is held to the same bound: whole prompts, chunks, caches, padded batches.
"""

from functools import cache
from typing import Any

import pytest
import torch
from golden import float64_loop, tiny, transformers_oracle
from golden.tiny_models import BOUND, config_of, error, fill, loop_logits, make, shared_model, transformers_logits
from torch import Tensor

from minibble.quantize.config import ModelConfig
from minibble.runtime.model import MiniMaxForCausalLM

LENGTHS = (26, 27, 29, 31, 26, 28, 33, 30)  # 8 prompts, 230 positions
PROMPTS = tiny.prompts(LENGTHS)
LONG = tiny.prompts((300,), seed=11)[0]

VARIANTS = {
    "4 heads": ("hf", {}),
    "original spelling": ("original", {}),
    "6 heads": ("hf", {"num_attention_heads": 6}),
    "6 heads, original": ("original", {"num_attention_heads": 6}),
    "3 heads, 1 key-value head": ("hf", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "12 heads, original": ("original", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}),
    "whole head rotated": ("hf", {"rotary_dim": 16}),
    "3 of 5 experts": ("hf", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "1 of 1 expert": ("hf", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "softmax first": ("hf", {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}),
    "lightning only": ("hf", {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3}),
    "softmax only": ("hf", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
}


def oracle_changes(spelling: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What the oracles are told; the slopes of odd head counts hang on the model type."""
    return changes | ({"model_type": "minimax_text_01"} if spelling == "original" else {})


@cache
def plain_model() -> MiniMaxForCausalLM:
    return make()


@pytest.fixture
def model() -> MiniMaxForCausalLM:
    """The tiny model, shared by the tests, with its own chunk size restored."""
    model = plain_model()
    chunk = model.prefill_chunk
    yield model
    model.prefill_chunk = chunk


def reference(prompt: list[int], **changes: Any) -> Tensor:
    return loop_logits(prompt, **changes)


@torch.no_grad()
def run(model: MiniMaxForCausalLM, prompt: list[int]) -> Tensor:
    """Float32 logits [T, V] of one unpadded prompt."""
    logits = model(input_ids=torch.tensor([prompt])).logits[0]
    assert logits.dtype == torch.float32
    return logits


def left_padded(prompts: list[list[int]], fill_ids: int = 5) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[fill_ids] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@pytest.mark.parametrize(("spelling", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_both_oracles(spelling: str, changes: dict[str, Any]) -> None:
    whole = not changes
    prompts = PROMPTS if whole else PROMPTS[:2]
    if whole:
        assert len(prompts) >= 8 and sum(map(len, prompts)) >= 200
    model = make(spelling, **changes)
    told = oracle_changes(spelling, changes)
    theirs = transformers_logits(prompts, **told)
    for prompt, other in zip(prompts, theirs, strict=True):
        logits = run(model, prompt)
        assert error(logits, reference(prompt, **told)) < BOUND
        assert error(logits, other) < BOUND


def test_spellings_give_the_same_bits() -> None:
    for prompt in PROMPTS[:2]:
        assert torch.equal(run(make("hf"), prompt), run(make("original"), prompt))


def test_port_as_it_comes_agrees_where_it_is_right() -> None:
    """Without any mending, transformers' port is right for a power of two of heads, wholly rotated."""
    config = tiny.plain_config(rotary_dim=16)
    port = transformers_oracle.build(config, tiny.random_weights(config, 3), mend=False)
    model = make(rotary_dim=16)
    for prompt in PROMPTS[:4]:
        with torch.no_grad():
            logits = port(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        assert error(run(model, prompt), logits) < BOUND


@pytest.mark.parametrize("mutation", float64_loop.MUTATIONS)
def test_bound_notices(mutation: str, model: MiniMaxForCausalLM) -> None:
    """Each known mistake moves the logits at least five times as far as the bound allows; most, a thousand times."""
    prompt = LONG[:60]
    assert error(run(model, prompt), reference(prompt)) < BOUND
    assert error(run(model, prompt), reference(prompt, mutation=mutation)) > 5 * BOUND


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_dim": 16},
        {"rope_parameters": {"rope_theta": 10001.0 * 1.2, "rope_type": "default"}},
        {"linear_attn_alpha_factor": 1.0},
        {"full_attn_alpha_factor": 1.0},
        {"mlp_alpha_factor": 1.0},
        {"linear_attn_beta_factor": 1.0},
        {"full_attn_beta_factor": 1.0},
        {"mlp_beta_factor": 1.0},
        {"rms_norm_eps": 1e-3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_constant_of_the_config_is_used(change: dict[str, Any], model: MiniMaxForCausalLM) -> None:
    other = make(**change)
    assert error(run(other, PROMPTS[0]), reference(PROMPTS[0])) > 10 * BOUND


@pytest.mark.parametrize("chunk", [1, 3, 63, 256])
def test_chunked_prefill(chunk: int, model: MiniMaxForCausalLM) -> None:
    prompts = PROMPTS if chunk == 1 else [*PROMPTS, LONG]
    whole = [run(model, prompt) for prompt in prompts]
    model.prefill_chunk = chunk
    for prompt, unchunked in zip(prompts, whole, strict=True):
        logits = run(model, prompt)
        assert error(logits, unchunked) < BOUND
        assert error(logits, reference(prompt)) < BOUND


@pytest.mark.parametrize("chunk", [3, 63])
@torch.no_grad()
def test_chunked_prefill_of_a_padded_batch_over_a_cache(chunk: int, model: MiniMaxForCausalLM) -> None:
    model.prefill_chunk = chunk
    rows = [LONG[:150], PROMPTS[0], PROMPTS[6]]
    ids, mask = left_padded(rows)
    cut = 135  # two rows have but a few tokens before it
    first = model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
    second = model(input_ids=ids[:, cut:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat((first.logits, second.logits), dim=1)
    for row, prompt in enumerate(rows):
        assert error(logits[row, -len(prompt) :], reference(prompt)) < BOUND


@pytest.mark.parametrize("steps", [(26,), (10, 7, 1, 1, 3, 1), (1,) * 12, (5, 200, 1, 94)], ids=str)
@torch.no_grad()
def test_over_a_cache(steps: tuple[int, ...], model: MiniMaxForCausalLM) -> None:
    """A prefix, then any number of tokens at once, then single ones."""
    prompt = LONG[: sum(steps)]
    state, parts, position = None, [], 0
    for step in steps:
        out = model(input_ids=torch.tensor([prompt[position : position + step]]), past_key_values=state, use_cache=True)
        state, position = out.past_key_values, position + step
        assert state.get_seq_length() == position
        parts.append(out.logits[0])
    assert error(torch.cat(parts), reference(LONG)[: len(prompt)]) < BOUND


@torch.no_grad()
def test_cache_with_explicit_positions(model: MiniMaxForCausalLM) -> None:
    prompt = PROMPTS[0]
    first = model(input_ids=torch.tensor([prompt[:11]]), position_ids=torch.arange(11)[None], use_cache=True)
    second = model(
        input_ids=torch.tensor([prompt[11:]]),
        position_ids=torch.arange(11, len(prompt))[None],
        past_key_values=first.past_key_values,
    )
    assert error(torch.cat((first.logits, second.logits), 1)[0], reference(prompt)) < BOUND


@torch.no_grad()
def test_left_padded_batch(model: MiniMaxForCausalLM) -> None:
    rows = [*PROMPTS, PROMPTS[0][:1], PROMPTS[1][:2]]
    ids, mask = left_padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row, prompt in enumerate(rows):
        alone = run(model, prompt)
        assert error(logits[row, -len(prompt) :], alone) < BOUND
        if len(prompt) > 2:
            assert error(logits[row, -len(prompt) :], reference(prompt)) < BOUND


@torch.no_grad()
def test_left_padded_batch_over_a_cache(model: MiniMaxForCausalLM) -> None:
    rows = [PROMPTS[6], PROMPTS[0], PROMPTS[1], PROMPTS[1][:2] + PROMPTS[2][:7]]
    ids, mask = left_padded(rows)
    state, parts, position = None, [], 0
    for step in (25, 4, 1, 1, 1, 1):
        out = model(
            input_ids=ids[:, position : position + step],
            attention_mask=mask[:, : position + step],
            past_key_values=state,
            use_cache=True,
        )
        state, position = out.past_key_values, position + step
        parts.append(out.logits)
    logits = torch.cat(parts, dim=1)
    for row, prompt in enumerate(rows):
        assert error(logits[row, -len(prompt) :], reference(prompt)) < BOUND


@torch.no_grad()
def test_right_padded_batch(model: MiniMaxForCausalLM) -> None:
    width = max(LENGTHS)
    ids = torch.tensor([p + [5] * (width - len(p)) for p in PROMPTS])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in PROMPTS])
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row, prompt in enumerate(PROMPTS):
        assert error(logits[row, : len(prompt)], reference(prompt)) < BOUND


@torch.no_grad()
def test_padding_between_turns(model: MiniMaxForCausalLM) -> None:
    """Right-padded prefixes, continued over the cache: the padding in the middle leaves no trace."""
    heads, tails = [PROMPTS[0][:20], PROMPTS[1][:14]], [PROMPTS[0][20:26], PROMPTS[1][14:20]]
    ids = torch.tensor([heads[0], heads[1] + [5] * 6])
    mask = torch.tensor([[1] * 20, [1] * 14 + [0] * 6])
    state = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    mask = torch.cat((mask, torch.ones(2, 6, dtype=torch.long)), dim=1)
    logits = model(input_ids=torch.tensor(tails), attention_mask=mask, past_key_values=state).logits
    for row in range(2):
        prompt = heads[row] + tails[row]
        assert error(logits[row], loop_logits(prompt)[-6:]) < BOUND


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model: MiniMaxForCausalLM) -> None:
    rows = [PROMPTS[6], PROMPTS[0]]
    (ids, mask), (other, _) = left_padded(rows, 5), left_padded(rows, 77)
    one = model(input_ids=ids, attention_mask=mask).logits
    two = model(input_ids=other, attention_mask=mask).logits
    for row, prompt in enumerate(rows):
        assert torch.equal(one[row, -len(prompt) :], two[row, -len(prompt) :])


@torch.no_grad()
def test_mask_of_ones_is_no_mask(model: MiniMaxForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    assert error(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, model(input_ids=ids).logits) < 1e-6


@torch.no_grad()
def test_logits_to_keep(model: MiniMaxForCausalLM) -> None:
    ids = torch.tensor(LONG[:40])[None]
    whole = model(input_ids=ids).logits
    model.prefill_chunk = 7
    for keep in (1, 5, 13):
        last = model(input_ids=ids, logits_to_keep=keep).logits
        assert last.shape == (1, keep, tiny.VOCAB)
        assert error(last, whole[:, -keep:]) < BOUND


@torch.no_grad()
def test_bf16_follows_the_float64_loop() -> None:
    """In bfloat16 the error is that of bfloat16, not that of a lost decay: many tokens, decays near 1."""
    changes = {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2}
    changes["layer_types"] = ["linear_attention"] * 2
    config = tiny.plain_config(**changes)
    weights = {k: v.bfloat16().float() for k, v in tiny.random_weights(config, 5).items()}
    model = fill(MiniMaxForCausalLM.random(config_of(**changes), dtype=torch.bfloat16, seed=0), weights)
    logits = model(input_ids=torch.tensor([LONG[:200]])).logits[0]
    assert logits.dtype == torch.float32
    right = float64_loop.logits(config, weights, LONG[:200])
    lost = float64_loop.logits(config, weights, LONG[:200], "bf16_decay")
    # bfloat16 noise depends on the CPU's instructions, so its size says little; which of the two is nearer does.
    to_right, to_lost = ((logits - other).pow(2).mean().sqrt() for other in (right, lost))
    assert to_right < 0.7 * to_lost, f"error {to_right:.4f}, but {to_lost:.4f} to the model with a bf16 decay"


def test_named_weights_are_the_inventory(model: MiniMaxForCausalLM) -> None:
    found = {name: tuple(view.shape) for name, view in model.named_weights()}
    assert found == dict(tiny.shapes(tiny.plain_config()))


def test_random_models_are_reproducible() -> None:
    config = config_of()
    one, two, other = (MiniMaxForCausalLM.random(config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(run(one, PROMPTS[0]), run(two, PROMPTS[0]))
    assert not torch.equal(run(one, PROMPTS[0]), run(other, PROMPTS[0]))


@torch.no_grad()
def test_trained_model_against_both_oracles() -> None:
    """On real text, with trained weights: 6 heads, partial rotary."""
    from safetensors.torch import load_file

    from minibble.runtime.loading import load

    folder = shared_model()
    config = ModelConfig.from_file(folder / "config.json")
    weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    model = load(folder, dtype=torch.float32)
    text = (folder.parent / "reference-a.eval.txt").read_text("utf-8")
    tokens = model.tokenizer.encode(text[:2000], add_special_tokens=False)
    prompts = [tokens[start : start + 26] for start in range(0, 8 * 26, 26)]
    for prompt, theirs in zip(prompts, transformers_oracle.logits(config, weights, prompts), strict=True):
        assert error(run(model, prompt), theirs) < BOUND
    assert error(run(model, prompts[0]), float64_loop.logits(config, weights, prompts[0])) < BOUND
