"""Experts of which the CPU computes a part: on the CPU, with the kernels in torch, and on a GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import asked, tiny
from golden.offloaded import CHUNK, short_of
from golden.placed import IDS, PROMPT, counted, placed, quantized
from golden.tiny_models import followed
from torch import Tensor
from torch.nn import functional as F

import minibble
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.nf4_math import decode
from minibble.runtime.experts import division, in_place
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.experts.processor import Processor
from minibble.runtime.kernels.moe4 import asking, reads
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.planning import rates
from minibble.runtime.planning.machine import Division, Gpu, Machine
from minibble.runtime.planning.processors import divisions, part_nbytes

W = ("w1", "w3", "w2")


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory, make_source: Any) -> Path:
    """A checkpoint whose experts can be divided, 512 hidden units for the GPU and 256 for the CPU."""
    return quantized(tmp_path_factory.mktemp("divided"), make_source, hidden_size=256, intermediate_size=768)


@pytest.fixture
def divided(divisible: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same where the CPU can take so much, and experts so small gain by it; the GPU's part is in torch."""
    monkeypatch.setattr(division.Copy, "seconds", lambda self: 1.0)
    monkeypatch.setattr(division, "compute_seconds", lambda processor, copy: processor.units / 512)
    monkeypatch.setattr(division, "AROUND_S", 0.0)
    monkeypatch.setattr(rates, "DIVIDED_S", 0.0)
    monkeypatch.setattr(HostLane, "reached", lambda self, memory: memory.data_ptr())
    monkeypatch.setattr(reads, "count_reads", lambda ids, far, counts: counts.add_(counted(ids, far)))
    monkeypatch.setattr(asking, "ask", asked.ask)
    monkeypatch.setattr(asking, "receive", asked.receive)
    return divisible


@pytest.mark.parametrize(("batch", "missing"), [(1, 3), (2, 1)])
def test_experts_on_the_cpu(
    divided: Path, machine: dict[str, Any], batch: int, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens get the same but for rounding, the GPU the first hidden units of an expert that one token alone chose."""
    ids = torch.tensor(tiny.prompts((30,) * batch, seed=12))
    right = followed(placed(divided), ids, PROMPT)
    model = placed(divided, missing, cpu_experts=True)
    (store,) = model.stores
    before, plain, left = store.stats, asking.receive, []

    def look(box: asking.Mailbox) -> Tensor:
        extra, units = plain(box), box.left
        assert extra.any() == (units < 768).any()
        assert all((box.ids == expert).sum() == 1 for expert in box.ids[units < 768]), "more tokens are the GPU's"
        left.extend(units.flatten().tolist())
        return extra

    monkeypatch.setattr(asking, "receive", look)
    found = followed(model, ids, PROMPT)
    errors = (found - right).norm(dim=-1) / right.norm(dim=-1)
    assert errors.median() < 0.01 and model.decode_path() == {"eager": ids.shape[1] - PROMPT}
    stats = store.stats.since(before)
    assert 0 < stats.computed <= stats.misses
    assert set(left) == {512, 768} and left.count(512) == stats.computed
    assert stats.bytes_from_host == (stats.misses + stats.prefetched - stats.computed / 3) * store.record_nbytes
    report, part = model.memory_report(context=64), model.placement.division  # type: ignore[union-attr]
    assert part is not None and report["predicted"]["cpu_units"] == part.units == 256
    assert report["measured"]["cpu_experts_bytes"] == report["predicted"]["cpu_experts"] * part.nbytes
    model.close()
    assert store.errands is None, "the CPU's parts are given back"


def test_experts_on_disk_come_whole(
    divided: Path, machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were to be pinned, too, where that is refused: the CPU could compute parts of them."""
    machine["disk_bytes"] = 10**9
    right = followed(placed(divided), IDS, PROMPT)
    monkeypatch.setattr(HostLane, "pin", lambda self, memory: "no more")
    with pytest.warns(UserWarning, match="experts wait in disk"):
        model = placed(divided, 3, cpu_experts=True, offload_folder=tmp_path)
    (store,) = model.stores
    assert torch.equal(followed(model, IDS, PROMPT), right)
    assert model.placement.computed and store.stats.bytes_from_disk and not store.stats.computed  # type: ignore[union-attr]
    model.close()


def test_no_experts_on_a_cpu_that_is_too_slow(divided: Path, machine: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(division, "compute_seconds", lambda processor, copy: 60.0)
        with pytest.warns(
            UserWarning, match="the CPU computes no parts of experts: with 768 hidden units, on 1 threads"
        ):
            model = placed(divided, 3, cpu_experts=True)
    assert all(store.errands is None for store in model.stores)
    assert model.memory_report(context=64)["measured"]["cpu_experts_bytes"] == 0
    model.close()


def test_no_experts_on_a_cpu_of_which_the_plan_expects_nothing(divided: Path, machine: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(rates, "DIVIDED_S", 1.0)
        with pytest.warns(UserWarning, match="to be quicker than reading them there"):
            model = placed(divided, 3, cpu_experts=True)
    assert model.placement.computed == () and model.placement.division is None  # type: ignore[union-attr]
    assert all(store.errands is None for store in model.stores)
    model.close()


def test_the_cpu_helps_the_layers_of_which_it_holds_experts(divided: Path, machine: dict[str, Any]) -> None:
    """With room for one: the other layers do not ask."""
    model = placed(divided, 3, cpu_experts=True)
    placement = model.placement
    assert placement is not None and placement.division is not None and len(placement.computed) > 3
    model.close()
    machine["host_bytes"] = placement.host_bytes + placement.division.nbytes
    model = placed(divided, 3, cpu_experts=True)
    ((layer, _),) = model.placement.computed  # type: ignore[union-attr]
    assert list(model.stores[0].errands.able) == [layer]  # type: ignore[union-attr]
    assert followed(model, IDS[:1], PROMPT).isfinite().all() and model.stores[0].stats.computed > 0
    model.close()


def test_host_memory_for_experts_on_the_cpu(divided: Path, machine: dict[str, Any]) -> None:
    """As many as there is room for beside the records, the hottest of each layer first."""
    model = placed(divided, 3)
    placement, source = model.placement, model.checkpoint
    assert placement is not None
    model.close()
    waiting = sum(map(len, placement.pinned))
    each = part_nbytes(source, 256, torch.float32)
    assert 3 * each == part_nbytes(source, 768, torch.float32)
    for room in (0, 1, 2, waiting, waiting + 5):
        part = Division(256, 768, 256, each)
        there = Machine((Gpu("cpu", 10**10),), 1000 + room * each + each // 2, division=part)
        ways = list(divisions(placement.pinned, 1000, there))
        assert [way for way, _ in ways] == [part] * bool(room)
        keys = ways[0][1] if ways else ()
        assert len(keys) == len(set(keys)) == min(room, waiting)
        assert all(expert in placement.pinned[layer] for layer, expert in keys)
    processor = Processor([(0, 1)], 256, torch.float32)
    parts = [source.read(source.specs[f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"]) for name in W]
    processor.put((0, 1), "gate_up", parts[:2])
    processor.put((0, 1), "down", parts[2:])
    processor.put((0, 2), "down", parts[2:])  # not one of them
    assert processor.nbytes == each
    x = torch.randn(3, parts[0].shape[1], generator=torch.Generator().manual_seed(0))
    gate, up, down = (decode(part).double() for part in parts)
    hidden = F.silu(x.double() @ gate.t()) * (x.double() @ up.t())
    right = hidden[:, 512:] @ down[:, 512:].t()
    assert float((processor((0, 1), x) - right).norm() / right.norm()) < 1e-4


@pytest.fixture(params=["nf4", "int4"])
def divided_gpu(
    request: pytest.FixtureRequest, make_source: Any, make_int4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkpoint of whose missing experts the CPU computes a third."""
    monkeypatch.setattr(division, "computed_units", lambda *given: 256)
    monkeypatch.setattr(rates, "DIVIDED_S", 0.0)  # beside which experts so small are nothing
    quantize = quantize_checkpoint if request.param == "nf4" else partial(make_int4, group=64)
    return quantized(tmp_path, make_source, quantize, hidden_size=256, intermediate_size=768, vocab_size=2000)


def helped(folder: Path, device: torch.device) -> MiniMaxForCausalLM:
    return minibble.load(folder, device=device, gpu_memory=short_of(folder, 0.9), prefill_chunk=CHUNK, cpu_experts=True)


@pytest.mark.gpu
def test_experts_that_the_cpu_computes(
    cuda_device: torch.device, divided_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token and of several, launch by launch and in graphs: as the GPU but for rounding."""
    resident = minibble.load(divided_gpu, device=cuda_device)
    monkeypatch.setattr(in_place, "MOST", 4.0)  # which two sequences choose of layers that lack all
    for batch in (1, 2):
        model = helped(divided_gpu, cuda_device)
        ids = torch.randint(4, 2000, (batch, 40), generator=torch.Generator().manual_seed(batch)).to(cuda_device)
        ours, right = followed(model, ids, 10), followed(resident, ids, 10)
        errors = (ours - right).norm(dim=-1) / right.norm(dim=-1)
        assert errors.median() < 0.01, "of most tokens; rounding sends some to other experts"
        assert model.stores[0].stats.computed > 0 and model.decode_path() == {"eager": 1, "graph": 29}
        model.close()


@pytest.mark.gpu
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_cpu_fails_while_the_gpu_waits_for_it(
    cuda_device: torch.device, divided_gpu: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph and launch by launch: the GPU goes on, and the next request is right."""
    model = helped(divided_gpu, cuda_device)
    ids = torch.randint(4, 2000, (1, 40), generator=torch.Generator().manual_seed(3)).to(cuda_device)
    right, plain, calls = followed(model, ids, 10), Processor.__call__, []
    for last in (3, 25):

        def failing(self: Processor, key: Any, x: Tensor, last: int = last) -> Tensor:
            calls.append(key)
            if len(calls) == last:
                raise error
            return plain(self, key, x)

        calls.clear()
        with monkeypatch.context() as context, pytest.raises(error):
            context.setattr(Processor, "__call__", failing)
            followed(model, ids, 10)
        torch.cuda.synchronize()
        assert torch.equal(followed(model, ids, 10), right)
    model.close()
