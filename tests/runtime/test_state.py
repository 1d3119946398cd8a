"""The state that sequences leave behind: copied, reordered, repeated, and always float32 where it decays."""

import math
from functools import cache

import pytest
import torch
from golden import tiny
from golden.tiny_models import config_of, fill, make
from torch import Tensor

from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.state import HybridState

PROMPTS = tiny.prompts((13, 13, 13), seed=31)
IDS = torch.tensor(PROMPTS)


@cache
def plain_model() -> MiniMaxForCausalLM:
    return make()


@torch.no_grad()
def after(ids: Tensor, mask: Tensor | None = None) -> HybridState:
    """The state after `ids` [B, T]."""
    return plain_model()(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values


@torch.no_grad()
def follow(state: HybridState, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of further tokens [B, T]; the state moves on."""
    return plain_model()(input_ids=ids, attention_mask=mask, past_key_values=state).logits


def padded(lengths: tuple[int, ...], width: int = 13) -> Tensor:
    return torch.tensor([[0] * (width - n) + [1] * n for n in lengths])


NEXT = torch.tensor([[7, 8, 9], [10, 11, 12], [13, 14, 15]])
MASK = padded((13, 9, 4))
LONGER = torch.cat((MASK, torch.ones(3, 3, dtype=torch.long)), dim=1)


def test_snapshot_continues_twice_to_the_same_bits() -> None:
    state = after(IDS, MASK)
    saved = state.snapshot()
    first = follow(state, NEXT, LONGER)
    follow(state, NEXT)
    assert saved.get_seq_length() == 13 and state.get_seq_length() == 19
    state.restore(saved)
    assert state.get_seq_length() == 13
    assert torch.equal(follow(state, NEXT, LONGER), first)
    state.restore(saved)  # what was restored from stays as it is
    assert torch.equal(follow(state, NEXT, LONGER), first)
    assert torch.equal(follow(saved, NEXT, LONGER), first)


def test_snapshot_shares_no_memory() -> None:
    state = after(IDS)
    saved = state.snapshot()
    expected = follow(saved.snapshot(), NEXT)
    for tensors in (state.lightning, state.keys, state.values):
        for tensor in tensors.values():
            with torch.inference_mode():
                tensor.fill_(float("nan"))
    assert torch.equal(follow(saved, NEXT), expected)


def test_snapshot_of_an_empty_state() -> None:
    state = HybridState(plain_model().minibble)
    saved = state.snapshot()
    first = follow(state, IDS)
    state.restore(saved)
    assert state.get_seq_length() == 0
    assert torch.equal(follow(state, IDS), first)


def test_reset_forgets_everything() -> None:
    state = after(IDS, MASK)
    state.reset()
    assert state.get_seq_length() == 0
    assert torch.equal(follow(state, IDS[:2]), follow(HybridState(plain_model().minibble), IDS[:2]))


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 2, 2]], ids=str)
def test_reorder(order: list[int]) -> None:
    state = after(IDS, MASK)
    state.reorder_cache(torch.tensor(order))
    same = after(IDS[order], MASK[order])
    ids, mask = NEXT, LONGER[order]
    assert torch.allclose(follow(state, ids, mask), follow(same, ids, mask), rtol=0, atol=1e-5)


def test_repeat_interleave() -> None:
    state = after(IDS, MASK)
    state.batch_repeat_interleave(2)
    order = [0, 0, 1, 1, 2, 2]
    same = after(IDS[order], MASK[order])
    ids, mask = torch.arange(6, 24).view(6, 3), LONGER[order]
    assert torch.allclose(follow(state, ids, mask), follow(same, ids, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("indices", [[1], [2, 0]], ids=str)
def test_select_indices(indices: list[int]) -> None:
    state = after(IDS, MASK)
    state.batch_select_indices(torch.tensor(indices))
    same = after(IDS[indices], MASK[indices])
    ids, mask = NEXT[: len(indices)], LONGER[indices]
    assert torch.allclose(follow(state, ids, mask), follow(same, ids, mask), rtol=0, atol=1e-5)


def test_rows_are_really_different() -> None:
    """The tests above would pass on a model that ignores its state; this one would not."""
    ids = NEXT[:1].repeat(3, 1)
    rows = follow(after(IDS), ids)
    assert (rows[0] - rows[1]).abs().max() > 0.1 and (rows[1] - rows[2]).abs().max() > 0.1


def test_crop_is_refused() -> None:
    state = after(IDS)
    assert not state.is_croppable
    with pytest.raises(NotImplementedError, match="snapshot"):
        state.crop(-1)


def test_without_use_cache_nothing_is_kept() -> None:
    with torch.no_grad():
        assert plain_model()(input_ids=IDS, use_cache=False).past_key_values is None


def test_bytes_are_those_of_the_config() -> None:
    """Lightning state as `report` counts it, whatever the length; keys and values at least one place a token."""
    from minibble.runtime.footprint import kv_cache_bytes, state_bytes

    config = plain_model().minibble
    state = after(IDS)
    lightning = sum(tensor.nbytes for tensor in state.lightning.values())
    assert lightning == state_bytes(config, 3)
    kept = sum(
        k[:, :, :13].nbytes + v[:, :, :13].nbytes
        for k, v in zip(state.keys.values(), state.values.values(), strict=True)
    )
    assert kept == kv_cache_bytes(config, 13, 3, itemsize=4)
    assert state.nbytes >= lightning + kept


def test_long_decoding_grows_the_cache() -> None:
    """Many single tokens, past any room reserved at first, give the logits of the whole at once."""
    prompt = tiny.prompts((600,), seed=2)[0]
    state = after(torch.tensor([prompt[:3]]))
    with torch.no_grad():
        model = plain_model()
        for start, stop in [(3, 4), (4, 5), (5, 290), (290, 291), (291, 560), (560, 599)]:
            follow(state, torch.tensor([prompt[start:stop]]))
        last = follow(state, torch.tensor([prompt[599:]]))
        whole = model(input_ids=torch.tensor([prompt]), logits_to_keep=1).logits
    assert (last - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("chunk", [1, 50, 1024], ids="chunks of {}".format)
@torch.no_grad()
def test_state_decays_in_float32_when_the_model_is_bf16(chunk: int) -> None:
    """Layer 0's state against float64, after so many tokens that a decay rounded to bfloat16 could not hide."""
    changes = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 4, "rotary_dim": 4}
    changes |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    plain = tiny.plain_config(**changes)
    weights = {name: tensor.bfloat16().float() for name, tensor in tiny.random_weights(plain, 3).items()}
    model = fill(MiniMaxForCausalLM.random(config_of(**changes), dtype=torch.bfloat16), weights)
    model.prefill_chunk = chunk
    prompt = tiny.prompts((400,), seed=8)[0]
    state = model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
    found = state.lightning[0][0].double()
    assert state.lightning[0].dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in state.lightning.values())
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.keys.values())

    x = weights["model.embed_tokens.weight"].double()[prompt]
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["model.layers.0.input_layernorm.weight"].double()
    qkv = x @ weights["model.layers.0.self_attn.qkv_proj.weight"].double().T
    k, v = torch.nn.functional.silu(qkv).view(400, 16, 3, 4)[:, :, 1:].unbind(2)

    def recurrence(rounded: bool) -> Tensor:
        S = torch.zeros(16, 4, 4, dtype=torch.float64)
        s = torch.tensor([2.0 ** (-8 * (h + 1) / 16) * (1 + 1e-5) for h in range(16)], dtype=torch.float64)
        decay = (-s).exp()
        decay = decay.bfloat16().double() if rounded else decay
        for t in range(400):
            S = decay[:, None, None] * S + k[t, :, :, None] * v[t, :, None, :]
        return S

    right, lost = recurrence(False), recurrence(True)
    distance = (lost - right).norm() / right.norm()
    assert distance > 0.1, "these slopes would not show a rounded decay"
    assert (found - right).norm() / right.norm() < 0.1 * distance


def test_slopes_are_not_rounded() -> None:
    """Of the slowest head of the released model, in its deepest lightning layer: 1 in bfloat16, not here."""
    from minibble.quantize.builtin import builtin_config
    from minibble.runtime.attention import decay_slopes

    slopes = decay_slopes(builtin_config("minimax-text-01"), 78)
    expected = [2.0 ** (-8 * (h + 1) / 64) * (1 - 78 / 79 + 1e-5) for h in range(64)]
    assert slopes.dtype == torch.float32
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(slopes.tolist(), expected, strict=True))
    decays = torch.exp(-slopes)
    assert (decays < 1).all() and (decays.bfloat16() == 1).any()
