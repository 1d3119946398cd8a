"""From a checkpoint over a plan to logits, without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.placed import IDS, PROMPT, counted, placed, quantized
from golden.tiny_models import followed
from safetensors.torch import load_file, save_file
from torch import Tensor

from minibble.quantize.errors import BudgetError, CheckpointError
from minibble.runtime import graphs, loading, unfilled
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.kernels.moe4 import reads
from minibble.runtime.loading import load
from minibble.runtime.state import HybridState


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_source: Any) -> Path:
    return quantized(tmp_path_factory.mktemp("placed"), make_source)


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
