"""The fused decode step and its graphs: against the ordinary path, which other tests hold to the oracles.

On the CPU the step runs launch by launch through the kernels' references, in float32, with the same bookkeeping.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from golden import tiny
from golden.tiny_models import follow, make, prefilled
from torch import Tensor

from minibble.runtime import graphs
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.state import HybridState

BOUND = 1e-5  # of the largest logit, in float32
PROMPT = tiny.prompts((11,), seed=41)[0]
NEXT = torch.tensor(tiny.prompts((16, 16, 16, 16, 16), seed=43))

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "6 heads": {"num_attention_heads": 6},
    "3 heads, 1 key-value head": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "whole head rotated": {"rotary_dim": 16},
    "3 of 5 experts": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "lightning only": {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3},
    "softmax only": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
}


@cache
def ordinary_model() -> MiniMaxForCausalLM:
    """It refuses fused steps: it is on the CPU."""
    return make(eos_token_id=None)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> MiniMaxForCausalLM:
    """The same model, which takes them."""
    monkeypatch.setattr(graphs, "unfused", lambda model: None)
    return make(eos_token_id=None)


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    ids = torch.tensor([[5] * (width - n) + p for n, p in zip(lengths, tiny.prompts(lengths, seed=47), strict=True)])
    return ids, torch.tensor([[0] * (width - n) + [1] * n for n in lengths])


def error(ours: Tensor, right: Tensor) -> float:
    assert ours.shape == right.shape and ours.dtype == torch.float32
    return float((ours - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_step_equals_the_ordinary_path(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    model = make(**changes)
    ids = torch.tensor([PROMPT])
    right = follow(model, prefilled(model, ids), NEXT[:1])
    assert set(model.decode_path()) == {"no GPU: the model is on cpu"}
    monkeypatch.setattr(graphs, "unfused", lambda model: None)
    model.decoder = graphs.Decoder()
    assert error(follow(model, prefilled(model, ids), NEXT[:1]), right) < BOUND
    assert model.decode_path() == {"eager": 16}


def test_the_embedding_may_be_elsewhere(fused: MiniMaxForCausalLM) -> None:
    """Here two names of the CPU are the two devices; prompts in pieces, steps, and the same rows to the bit."""
    table, there = fused.embedding, torch.device("cpu", 0)
    ids, mask = padded((4, 9, 2))
    fused.prefill_chunk = 4
    right = follow(fused, prefilled(fused, ids, mask), NEXT[:3])
    assert not table.elsewhere and table.host_nbytes == 0
    table.on = there
    assert table.elsewhere and fused.device == there
    assert table.host_nbytes == table.weight.nbytes  # type: ignore[union-attr]
    assert torch.equal(table(ids), torch.nn.functional.embedding(ids, table.weight).to(fused.dtype))  # type: ignore[arg-type]
    assert error(follow(fused, prefilled(fused, ids, mask), NEXT[:3]), right) == 0
    assert fused.decode_path() == {"eager": 32}


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (4, 9, 1), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["mask given", "mask in the state"])
def test_left_padded_batches(fused: MiniMaxForCausalLM, lengths: tuple[int, ...], given: bool) -> None:
    ids, mask = padded(lengths)
    more = NEXT[: len(lengths)]
    whole = torch.cat((mask, torch.ones_like(more)), dim=1)
    right = follow(ordinary_model(), prefilled(ordinary_model(), ids, mask), more, whole)
    state = prefilled(fused, ids, mask)
    assert error(follow(fused, state, more, whole if given else None), right) < BOUND
    assert fused.decode_path() == {"eager": 16}
    if len(set(lengths)) > 1:
        assert state.valid is not None and torch.equal(state.valid, whole.bool())
    else:
        assert state.valid is None


def test_a_mask_may_come_and_go(fused: MiniMaxForCausalLM) -> None:
    """Padding that only a later call tells of, or takes back, counts from then on."""
    ids, mask = padded((4, 9, 2))
    ones = torch.ones(3, 16, dtype=torch.long)
    logits = []
    for model in (ordinary_model(), fused):
        state = prefilled(model, ids)
        first = follow(model, state, NEXT[:3, :2])
        second = follow(model, state, NEXT[:3, 2:4], torch.cat((mask, ones[:, :4]), dim=1))
        third = follow(model, state, NEXT[:3, 4:6])
        fourth = follow(model, state, NEXT[:3, 6:8], torch.ones(3, 17, dtype=torch.long))
        logits.append(torch.cat((first, second, third, fourth), dim=1))
    assert error(logits[1], logits[0]) < BOUND
    assert fused.decode_path() == {"eager": 8}


def test_positions_may_be_given(fused: MiniMaxForCausalLM) -> None:
    logits = []
    for model in (ordinary_model(), fused):
        state = prefilled(model, torch.tensor([PROMPT]))
        with torch.no_grad():
            far = torch.tensor([[1_000_003]])
            logits.append(model(NEXT[:1, :1], position_ids=far, past_key_values=state).logits)
    assert error(logits[1], logits[0]) < BOUND


def test_growing_beyond_the_room(fused: MiniMaxForCausalLM) -> None:
    ids = torch.tensor([PROMPT])
    right = follow(ordinary_model(), prefilled(ordinary_model(), ids), NEXT[:1])
    state = prefilled(fused, ids, reserve=len(PROMPT) + 3)
    assert error(follow(fused, state, NEXT[:1]), right) < BOUND
    assert state.capacity > len(PROMPT) + 16


def test_several_tokens_in_between(fused: MiniMaxForCausalLM) -> None:
    """A second turn's prompt goes the ordinary way, into the same places."""
    logits = []
    for model in (ordinary_model(), fused):
        state = prefilled(model, torch.tensor([PROMPT]))
        first = follow(model, state, NEXT[:1, :4])
        bound = state.bound
        with torch.no_grad():
            turn = model(NEXT[:1, 4:9], past_key_values=state).logits
        logits.append(torch.cat((first, turn, follow(model, state, NEXT[:1, 9:])), dim=1))
        assert state.bound is bound
    assert error(logits[1], logits[0]) < BOUND


def test_snapshot_and_restore(fused: MiniMaxForCausalLM) -> None:
    ids, mask = padded((4, 9, 2))
    state = prefilled(fused, ids, mask)
    first = follow(fused, state, NEXT[:3, :5])
    bound, saved = state.bound, state.snapshot()
    assert bound is not None and saved.bound is None
    second = follow(fused, state, NEXT[:3, 5:])
    state.restore(saved)
    assert state.bound is bound and state.length == 14
    assert torch.equal(follow(fused, state, NEXT[:3, 5:]), second)
    assert torch.equal(follow(fused, saved, NEXT[:3, 5:]), second)
    right = follow(ordinary_model(), prefilled(ordinary_model(), ids, mask), NEXT[:3])
    assert error(torch.cat((first, second), dim=1), right) < BOUND


def test_two_states_take_turns(fused: MiniMaxForCausalLM) -> None:
    prompts = (torch.tensor([PROMPT]), NEXT[:2, 3:])
    states = [prefilled(fused, ids) for ids in prompts]
    logits: list[list[Tensor]] = [[], []]
    for t in range(8):
        for which, state in enumerate(states):
            logits[which].append(follow(fused, state, NEXT[: state.batch_size, t : t + 1]))
    for which, ids in enumerate(prompts):
        right = follow(ordinary_model(), prefilled(ordinary_model(), ids), NEXT[: ids.shape[0], :8])
        assert error(torch.cat(logits[which], dim=1), right) < BOUND


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda state: state.reorder_cache(torch.tensor([2, 0, 0])), True),
        (lambda state: state.batch_select_indices(torch.tensor([1])), False),
        (lambda state: state.batch_repeat_interleave(2), False),
    ],
    ids=["reordered", "selected", "repeated"],
)
def test_changes_of_the_batch(fused: MiniMaxForCausalLM, change: Any, kept: bool) -> None:
    """A reordered batch keeps its places, so that beam search keeps its graph; one of another size cannot."""
    ids, mask = padded((4, 9, 2))
    logits = []
    for model in (ordinary_model(), fused):
        state = prefilled(model, ids, mask)
        follow(model, state, NEXT[:3, :3])
        bound, places = state.bound, [x.data_ptr() for held in state._tensors() for x in held.values()]
        change(state)
        if model is fused:
            assert (state.bound is bound) == kept
            assert ([x.data_ptr() for held in state._tensors() for x in held.values()] == places) == kept
        more = NEXT[:1, 3:].repeat(state.batch_size, 1)
        logits.append(follow(model, state, more))
    assert error(logits[1], logits[0]) < BOUND


def test_copies_of_a_state_are_free(fused: MiniMaxForCausalLM) -> None:
    state = prefilled(fused, torch.tensor([PROMPT]))
    follow(fused, state, NEXT[:1, :3])
    twin = copy.deepcopy(state)
    assert state.bound is not None and twin.bound is None
    assert torch.equal(follow(fused, twin, NEXT[:1, 3:]), follow(fused, state, NEXT[:1, 3:]))


def test_reset_starts_anew(fused: MiniMaxForCausalLM) -> None:
    state = prefilled(fused, torch.tensor([PROMPT]))
    follow(fused, state, NEXT[:1])
    state.reset()
    assert state.bound is None
    with torch.no_grad():
        fused(NEXT[:2, :5], past_key_values=state)
    right = follow(ordinary_model(), prefilled(ordinary_model(), NEXT[:2, :5]), NEXT[:2, 5:])
    assert error(follow(fused, state, NEXT[:2, 5:]), right) < BOUND


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_takes_it_by_itself(fused: MiniMaxForCausalLM, beams: int) -> None:
    ids, mask = padded((4, 9, 2))
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    right = ordinary_model().generate(ids, attention_mask=mask, **settings)
    assert torch.equal(fused.generate(ids, attention_mask=mask, **settings), right)
    assert fused.decode_path() == {"eager": 11}


def test_another_turn_makes_room_once(fused: MiniMaxForCausalLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = fused.generate(torch.tensor([PROMPT]), **settings)
    state = first.past_key_values
    assert state.capacity == len(PROMPT) + 5
    turn = torch.cat((first.sequences, NEXT[:1]), dim=1)
    fused.generate(turn, past_key_values=state, **settings)
    assert state.capacity == turn.shape[1] + 5 and fused.decode_path() == {"eager": 10}


def test_generate_does_not_look_at_the_mask(fused: MiniMaxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = padded((4, 9, 2))
    looked: list[Any] = []
    plain = graphs.attention_mask_2d
    monkeypatch.setattr(graphs, "attention_mask_2d", lambda *args: looked.append(args) or plain(*args))
    fused.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert fused.decode_path() == {"eager": 7} and not looked


def test_the_ordinary_path_is_taken_where_it_must(fused: MiniMaxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(mask: Tensor | None = None) -> dict[str, int]:
        fused.decoder.taken.clear()
        state = prefilled(fused, NEXT[:2, :5])
        logits = follow(fused, state, NEXT[:2, 5:6], mask)
        right = follow(ordinary_model(), prefilled(ordinary_model(), NEXT[:2, :5]), NEXT[:2, 5:6], mask)
        real = slice(None) if mask is None else mask[:, -1].bool()
        assert error(logits[real], right[real]) < BOUND
        return fused.decode_path()

    assert once() == {"eager": 1}
    assert once(torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])) == {"padding among the new tokens": 1}
    fused.decoder.max_batch = 1
    assert once() == {"more than 1 sequences": 1}
    fused.decoder.max_batch = 2
    monkeypatch.setenv("MINIBBLE_KERNELS", "reference")
    assert once() == {"MINIBBLE_KERNELS=reference": 1}
    monkeypatch.delenv("MINIBBLE_KERNELS")
    state = HybridState(fused.minibble)
    fused.decoder.taken.clear()
    fused(NEXT[:2, :5], past_key_values=state)
    fused(NEXT[:2, 5:6], past_key_values=state)
    assert fused.decode_path() == {"gradients are enabled": 1}


def test_prompts_are_not_counted(fused: MiniMaxForCausalLM) -> None:
    prefilled(fused, NEXT[:1, :1])
    prefilled(fused, NEXT)
    assert fused.decode_path() == {}


def test_moved_weights_are_looked_at_again(fused: MiniMaxForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    state = prefilled(fused, NEXT[:1, :5])
    follow(fused, state, NEXT[:1, 5:8])
    monkeypatch.setattr(graphs, "unfused", lambda model: "elsewhere now")
    follow(fused, state, NEXT[:1, 8:9])
    assert fused.decode_path() == {"eager": 4}
    fused.to(torch.device("cpu"))
    follow(fused, state, NEXT[:1, 9:10])
    assert fused.decode_path() == {"eager": 4, "elsewhere now": 1}


def test_a_model_may_be_copied(fused: MiniMaxForCausalLM) -> None:
    fused.decoder.max_batch = 7
    follow(fused, prefilled(fused, NEXT[:1, :5]), NEXT[:1, 5:8])
    twin = copy.deepcopy(fused)
    assert twin.decoder.max_batch == 7 and twin.decode_path() == {}
