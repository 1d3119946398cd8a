"""From a checkpoint over a plan to logits, without a GPU: the kernels are read back byte by byte at their addresses."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import asked, tiny
from golden.tiles_by_byte import read_back
from golden.tiny_models import followed
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from minibble.quantize.errors import BudgetError, CheckpointError
from minibble.quantize.formats import Format
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.nf4_math import decode
from minibble.runtime import graphs, loading, measured, unfilled
from minibble.runtime import model as model_module
from minibble.runtime.experts import division
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.experts.processor import Processor
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.kernels.moe4 import asking, reads, table
from minibble.runtime.kernels.moe4.table import RecordTable
from minibble.runtime.kernels.tiles import TileLayout
from minibble.runtime.loading import load
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.planning import rates
from minibble.runtime.planning.machine import Division, Gpu, Machine
from minibble.runtime.planning.processors import divisions, part_nbytes
from minibble.runtime.state import HybridState

IDS = torch.tensor(tiny.prompts((30, 30), seed=11))
PROMPT = 24
W = ("w1", "w3", "w2")
CHUNK = 64  # tokens at a time: memory for smaller pieces would hold all of these small experts
_read: dict[bytes, Tensor] = {}


def matrix(record: bytes, layout: TileLayout) -> Tensor:
    key = record[: layout.nbytes]
    if key not in _read:
        _read[key] = read_back(key, layout)[: layout.N, : layout.K]
    return _read[key]


def by_address(
    self: RecordTable,
    addresses_E: Tensor,
    x_MD: Tensor,
    ids_MA: Tensor,
    weights_MA: Tensor,
    units_MA: Tensor | None = None,
) -> Tensor:
    """What the kernels compute, float32 [1, M, D], from the records to which the addresses on the device point."""
    out = torch.zeros(x_MD.shape)
    for token, (ids, weights) in enumerate(zip(ids_MA.tolist(), weights_MA.tolist(), strict=True)):
        for slot, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
            record = ctypes.string_at(int(addresses_E[expert]), self.gate_up.nbytes + self.down.nbytes)
            both = (matrix(record, self.gate_up) @ x_MD[token].float()).view(-1, 2, 16)
            hidden = (F.silu(both[:, 0]) * both[:, 1]).flatten()
            if units_MA is not None:
                hidden[int(units_MA[token, slot]) :] = 0
            out[token] += weight * (matrix(record[self.gate_up.nbytes :], self.down) @ hidden)
    return out[None]


def layouts(D: int, inner: int, format: Format, *others: Any) -> tuple[TileLayout, TileLayout]:
    gate_up, down = TileLayout.of_format((inner, inner), D, format, True), TileLayout.of_format((D,), inner, format)
    assert gate_up is not None and down is not None
    return gate_up, down


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The CPU in place of a GPU, with as much memory as is said here, and the kernels in torch."""
    there: dict[str, Any] = {"host_bytes": None, "disk_bytes": None}
    gpu = Gpu("cpu", 10**10)
    monkeypatch.setattr(
        measured,
        "this_machine",
        lambda devices, host, folder: Machine((gpu,), there["host_bytes"], there["disk_bytes"]),
    )
    for module in (table, unfilled):
        monkeypatch.setattr(module, "record_layouts", layouts)
    there["caps"] = []
    for module in (unfilled, model_module):
        monkeypatch.setattr(module, "cap", lambda device, nbytes: there["caps"].append((str(device), nbytes)))
    monkeypatch.setattr(graphs, "unfused", lambda model: None)
    monkeypatch.setattr(RecordTable, "read", by_address)
    monkeypatch.setattr(RecordTable, "__call__", lambda self, *given: by_address(self, self.addresses, *given))
    return there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_source: Any) -> Path:
    return quantized(tmp_path_factory.mktemp("placed"), make_source)


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, make_source: Any) -> Iterator[Path]:
    """One whose experts can be divided, 512 hidden units for the GPU and 256 for the CPU."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(division.Copy, "seconds", lambda self: 1.0)
        context.setattr(division, "compute_seconds", lambda processor, copy: processor.units / 512)
        context.setattr(division, "AROUND_S", 0.0)
        context.setattr(rates, "DIVIDED_S", 0.0)  # beside which experts so small are nothing
        context.setattr(HostLane, "reached", lambda self, memory: memory.data_ptr())
        context.setattr(reads, "count_reads", lambda ids, far, counts: counts.add_(counted(ids, far)))
        context.setattr(asking, "ask", asked.ask)
        context.setattr(asking, "receive", asked.receive)
        yield quantized(tmp_path_factory.mktemp("divided"), make_source, hidden_size=256, intermediate_size=768)


def quantized(folder: Path, make_source: Any, **changes: Any) -> Path:
    config = tiny.original_json(num_hidden_layers=3, attn_type_list=[0, 0, 1], **changes)
    source = make_source(folder / "m", config=config)
    out = quantize_checkpoint(source, folder / "nf4").out
    for path in out.glob("tokenizer*"):
        path.unlink()
    return out


def placed(folder: Path, missing: int = 0, **options: Any) -> MiniMaxForCausalLM:
    """The model, with memory for all experts but so many."""
    whole = load(folder, device="cpu", dtype=torch.bfloat16, prefill_chunk=CHUNK)
    assert whole.placement is not None and not whole.stores
    if not missing:
        return whole
    budget = whole.placement.total_bytes - missing * whole.placement.record_bytes
    return load(folder, budget, "cpu", torch.bfloat16, prefill_chunk=CHUNK, **options)


def test_records_are_the_checkpoints_experts(folder: Path, machine: dict[str, Any]) -> None:
    """Against the ordinary path, which decodes them from the file's own form."""
    model = placed(folder)
    found = followed(model, IDS, PROMPT)
    assert model.decode_path() == {"eager": IDS.shape[1] - PROMPT}
    with pytest.MonkeyPatch.context() as context:
        context.setattr(loading, "packs", lambda *args: False)
        context.setattr(unfilled.Unfilled, "_hold_all", lambda self, layer: None)
        context.setattr(graphs, "unfused", lambda model: "not now")
        right = followed(load(folder, device="cpu", dtype=torch.bfloat16), IDS, PROMPT)
    errors = (found - right).norm(dim=-1) / right.norm(dim=-1)
    assert errors.median() < 0.015, "of most tokens; rounding sends some to other experts"


@pytest.mark.parametrize("missing", [1, 3])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_experts_elsewhere_change_no_bit(
    folder: Path, machine: dict[str, Any], tmp_path: Path, missing: int, where: str
) -> None:
    right = followed(placed(folder), IDS, PROMPT)
    options: dict[str, Any] = {}
    if where == "disk":
        record = placed(folder).placement.record_bytes  # type: ignore[union-attr]
        machine |= {"host_bytes": 6 * record, "disk_bytes": 10**9}
        options = {"offload_folder": tmp_path}
    model = placed(folder, missing, **options)
    (store,) = model.stores
    assert torch.equal(followed(model, IDS, PROMPT), right)
    stats = store.stats
    assert stats.misses > 0 and stats.hits > 0 and (stats.bytes_from_disk > 0) == (where == "disk")
    assert not store._bank.slots.held, "given up after the last step"
    report = model.memory_report(context=64)
    assert report["measured"]["weights_bytes"] > 0 and (report["measured"]["disk_bytes"] > 0) == (where == "disk")
    assert report["predicted"]["devices"][0]["experts"] < 3 * 4
    store.close()
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("missing", [3, 5])
def test_experts_read_where_they_wait(
    folder: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """By steps of one sequence, without a pause; the kernels' addresses are those of host memory."""
    right = followed(placed(folder), IDS[:1], PROMPT)
    monkeypatch.setattr(HostLane, "reached", lambda self, memory: memory.data_ptr())
    monkeypatch.setattr(reads, "count_reads", lambda ids, far, counts: counts.add_(counted(ids, far)))
    model = placed(folder, missing)
    (store,) = model.stores
    state = HybridState(model.minibble, reserve=IDS.shape[1])
    with torch.inference_mode():
        logits = [model(IDS[:1, :PROMPT], past_key_values=state).logits]
        before = store.stats
        logits += [model(IDS[:1, t : t + 1], past_key_values=state).logits for t in range(PROMPT, IDS.shape[1])]
    assert torch.equal(torch.cat(logits, dim=1), right)
    stats, steps = store.stats.since(before), IDS.shape[1] - PROMPT
    lacking = sum(len(ids) < 4 for ids in store.tiering.resident.values())
    assert stats.in_place == stats.misses > 0 and not stats.evictions
    assert stats.hits + stats.misses == 2 * steps * lacking
    assert stats.bytes_from_host == stats.in_place * store.record_nbytes
    model.close()


def counted(ids: Tensor, far: Tensor) -> Tensor:
    """Different experts near and far."""
    chosen = far[ids.flatten().unique().long()]
    return torch.tensor([int((chosen == 0).sum()), int(chosen.sum())])


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


def test_calibrated_checkpoints_keep_their_hottest_experts(folder: Path, machine: dict[str, Any]) -> None:
    counts = [[1, 100, 1, 50], [70, 1, 1, 80], [1, 1, 90, 60]]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(loading, "_expert_counts", lambda checkpoint: counts)
        model = placed(folder, 1)
    assert model.placement is not None
    for resident, row in zip(model.placement.resident, counts, strict=True):
        coldest_kept = min((row[e] for e in resident), default=max(row))
        assert all(row[e] <= coldest_kept for e in range(4) if e not in resident)
    for store in model.stores:
        store.close()


def test_weights_beyond_the_kernels(make_source: Any, tmp_path: Path, machine: dict[str, Any]) -> None:
    """A scale that makes them too large for float16 is named while loading."""
    broken = quantized(tmp_path, make_source)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{name}.nested_absmax" in tensors:
            tensors[f"{name}.nested_absmax"] *= 1e6
            save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S*experts\.2\.w2\.weight: weights of up to \S+, kernels"):
        placed(broken)


def test_a_failure_while_loading_gives_the_memory_back(
    folder: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ExpertStore] = []
    plain_close, plain_put = ExpertStore.close, ExpertStore.put

    def put(self: ExpertStore, layer: int, expert: int) -> Tensor:
        if layer == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain_put(self, layer, expert)

    def close(self: ExpertStore) -> None:
        closed.append(self)
        plain_close(self)

    monkeypatch.setattr(ExpertStore, "put", put)
    monkeypatch.setattr(ExpertStore, "close", close)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        placed(folder, 3)
    assert len(closed) == 1 and closed[0].host_nbytes == 0
    assert machine["caps"][-2][1] > 0 and machine["caps"][-1] == ("cpu", None), "the bound is lifted again"
    monkeypatch.setattr(ExpertStore, "put", plain_put)
    model = placed(folder, 3)
    assert followed(model, IDS, PROMPT).isfinite().all()
    model.stores[0].close()


def test_a_read_that_fails_and_the_next_request(folder: Path, machine: dict[str, Any], tmp_path: Path) -> None:
    right = followed(placed(folder), IDS, PROMPT)
    record = placed(folder).placement.record_bytes  # type: ignore[union-attr]
    machine |= {"host_bytes": 6 * record, "disk_bytes": 10**9}
    model = placed(folder, 3, offload_folder=tmp_path)
    (store,) = model.stores
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes(len(data)))
    with pytest.raises(CheckpointError, match="changed or replaced"):
        followed(model, IDS, PROMPT)
    assert not store._bank.slots.held
    with path.open("r+b") as file:
        file.write(data)
    store._tiers.disk.seal()  # type: ignore[union-attr]  # as if nothing had been
    assert torch.equal(followed(model, IDS, PROMPT), right)
    store.close()


def test_evaluate_places_and_gives_back(folder: Path, machine: dict[str, Any], tmp_path: Path) -> None:
    """The windows' logits come a few positions at a time, so that no plan need have room for all."""
    from minibble.runtime import evaluate as scoring

    ids = list(range(3, 63)) * 4
    plain, budget = placed(folder), placed(folder, 3).placement
    assert budget is not None
    found = []
    for memory in (None, budget.devices[0].budget_bytes):
        with pytest.MonkeyPatch.context() as context:
            windows = [torch.tensor(ids[i : i + 80]) for i in range(0, 240, 80)]
            context.setattr(scoring, "_windows", lambda *args, windows=windows: windows)
            text = tmp_path / "text"
            found.append(scoring.evaluate(folder, text, seq_len=80, device="cpu", dtype=plain.dtype, gpu_memory=memory))
    assert found[0] == found[1] and found[0].tokens == 3 * 79
    assert machine["caps"][-1] == ("cpu", None)


def test_too_little_for_the_context(folder: Path, machine: dict[str, Any]) -> None:
    model = placed(folder, 3)
    assert model.placement is not None
    model.memory_plan(64).check()
    with pytest.raises(BudgetError, match="load the model for so large a context"):
        model.memory_plan(100_000_000).check()
    model.stores[0].close()
