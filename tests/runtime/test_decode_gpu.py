"""Decoding by CUDA graphs: the built-in model in 4 bits, against its ordinary path and float32."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from golden.tiny_models import follow, prefilled
from torch import Tensor

import minibble
from minibble.runtime import graphs
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.state import HybridState

pytestmark = pytest.mark.gpu
LENGTHS = [(40,), (40, 40), (40, 7, 23), (40, 1, 39, 20), (5, 40, 12, 33, 40)]


@pytest.fixture
def model(cuda_device: torch.device, demo_nf4: Path) -> MiniMaxForCausalLM:
    return minibble.load(demo_nf4, device=cuda_device)


def batch_of(lengths: tuple[int, ...], device: torch.device, more: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts, their mask, and tokens to follow."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(4, 2000, (len(lengths), max(lengths) + more), generator=generator)
    mask = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, : max(lengths) - n] = 0
    return ids[:, : max(lengths)].to(device), mask.to(device), ids[:, max(lengths) :].to(device)


def by_reference(model: MiniMaxForCausalLM, demo_nf4: Path, *inputs: Tensor) -> Tensor:
    """Logits by the plain path in float32."""
    exact = minibble.load(demo_nf4, device=model.device, dtype=torch.float32)
    ids, mask, more = inputs
    logits = follow(exact, prefilled(exact, ids, mask), more)
    assert set(exact.decode_path()) == {"activations are float32, not bfloat16"}
    return logits


def distance(ours: Tensor, right: Tensor) -> float:
    return float((ours - right).norm() / right.norm())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_graph_follows_the_reference(
    model: MiniMaxForCausalLM, demo_nf4: Path, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 tokens, as near to float32 as the ordinary path in bfloat16 is."""
    inputs = batch_of(lengths, model.device)
    ids, mask, more = inputs
    state = prefilled(model, ids, mask, reserve=200)
    logits = follow(model, state, more)
    assert model.decode_path() == {"eager": 1, "graph": 99}
    with monkeypatch.context() as context:
        context.setattr(model.decoder, "max_batch", 0)
        ordinary = follow(model, prefilled(model, ids, mask, reserve=200), more)
    right = by_reference(model, demo_nf4, *inputs)
    # The median over tokens: rounding makes now and then a token take another expert, in either path.
    graph, plain = (((x - right).norm(dim=-1) / right.norm(dim=-1)).median() for x in (logits, ordinary))
    print(f"{lengths}: graph {graph:.5f}, ordinary {plain:.5f}")
    assert graph < 1.2 * plain and distance(logits, right) < 0.03


@pytest.mark.parametrize("lengths", [(300,), (300, 41, 299)], ids=str)
@pytest.mark.parametrize("chunk", [64, 1024])
def test_prompts_follow_the_reference(
    model: MiniMaxForCausalLM, demo_nf4: Path, lengths: tuple[int, ...], chunk: int
) -> None:
    """In one piece and in several, where causality does not start at the first key."""
    ids, mask, _ = batch_of(lengths, model.device, more=0)
    exact = minibble.load(demo_nf4, device=model.device, dtype=torch.float32)
    model.prefill_chunk, real = chunk, mask.bool()
    with torch.no_grad():
        right = exact(ids, mask).logits[real]
        logits = model(ids, mask).logits[real]
        one_by_one = follow(model, HybridState(model.minibble, reserve=300), ids[:1]) if len(lengths) == 1 else None
    error = ((logits - right).norm(dim=-1) / right.norm(dim=-1)).median()
    print(f"{lengths} {chunk}: {error:.5f}")
    assert error < 0.012
    if one_by_one is not None:
        assert distance(one_by_one[0], right) < 0.03


def test_graph_survives_what_states_go_through(model: MiniMaxForCausalLM, demo_nf4: Path) -> None:
    """Snapshot and restore, a second state, growth, another turn of several tokens, beams changing places."""
    inputs = batch_of((40, 7, 23), model.device)
    ids, mask, more = inputs
    right = by_reference(model, demo_nf4, *inputs)
    state, other = prefilled(model, ids, mask, reserve=50), prefilled(model, ids[:1], reserve=50)
    pieces = []
    for t in range(0, 20, 2):  # growth at the 10th token
        pieces.append(follow(model, state, more[:, t : t + 2]))
        follow(model, other, more[:1, t : t + 1])
    saved = state.snapshot()
    first = follow(model, state, more[:, 20:40])
    state.restore(saved)
    assert torch.equal(follow(model, state, more[:, 20:40]), first)
    with torch.no_grad():
        turn = model(more[:, 40:60], past_key_values=state).logits
    pieces += [first, turn, follow(model, state, more[:, 60:70])]
    assert distance(torch.cat(pieces, dim=1), right[:, :70]) < 0.03
    order = torch.tensor([2, 0, 0], device=model.device)
    state.reorder_cache(order)
    before = model.decode_path()["eager"]
    swapped = follow(model, state, more[order][:, 70:80])
    assert distance(swapped, right[order][:, 70:80]) < 0.03
    assert model.decode_path()["eager"] == before
    assert set(model.decode_path()) == {"eager", "graph"}


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_on_graphs(model: MiniMaxForCausalLM, beams: int) -> None:
    """Each token chosen is likeliest, or as good as, by the ordinary path fed with the same tokens."""
    ids, mask, _ = batch_of((40, 7, 23), model.device)
    settings: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    out = model.generate(ids, attention_mask=mask, **settings)
    taken = model.decode_path()
    assert taken["graph"] >= 50 and set(taken) == {"eager", "graph"}
    if beams == 1:
        whole = torch.cat((mask, mask.new_ones(3, 59)), dim=1)
        with torch.no_grad():
            logits = model(out[:, :-1], whole).logits[:, ids.shape[1] - 1 :]
        chosen = logits.gather(-1, out[:, ids.shape[1] :, None]).squeeze(-1)
        gap = logits.amax(-1) - chosen
        assert float(gap.max()) < 0.03 * float(logits.abs().max()), gap.max()


def test_memory_comes_back(model: MiniMaxForCausalLM) -> None:
    """Neither graphs nor what they work in outlive the states and the model."""
    import gc

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    ids, mask, more = batch_of((40, 7), model.device, more=8)
    follow(model, prefilled(model, ids, mask), more)  # what is kept for good: workspaces, tables
    before = held()
    states = [prefilled(model, ids, mask) for _ in range(graphs.MAX_GRAPHS + 3)]
    for state in states:
        follow(model, state, more)
    assert sum(bool(state.bound.graphs) for state in states) == graphs.MAX_GRAPHS
    del states, state
    assert held() <= before


def test_threads_take_turns(model: MiniMaxForCausalLM) -> None:
    """Two threads, each on its own stream and state, capture and replay at the same time."""
    ids, mask, more = batch_of((40, 7), model.device, more=40)
    right = follow(model, prefilled(model, ids, mask), more)
    found: dict[int, Tensor] = {}

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(model.device)):
            found[which] = follow(model, prefilled(model, ids, mask), more)
            torch.cuda.synchronize()

    threads = [Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for logits in found.values():
        assert distance(logits, right) < 1e-3
