"""Models whose experts are not all on their GPU, and models on several GPUs: the same logits, to the bit."""

import copy
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.expert_stores import RECORD, make, placement
from golden.offloaded import CHUNK, short_of
from golden.tiny_models import followed
from golden.tiny_models import make as make_model
from torch import Tensor, nn

import minibble
from minibble.quantize.errors import BudgetError, CheckpointError, StateError
from minibble.runtime import graphs
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.table import ALL_FROM, Fetch, OffloadedTable
from minibble.runtime.experts.turns import Turns
from minibble.runtime.kernels.moe4 import moe4
from minibble.runtime.kernels.moe4.table import RecordTable
from minibble.runtime.kernels.tiles import TileLayout
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.state import HybridState
from minibble.runtime.unfilled import Unfilled

CPU = torch.device("cpu")


# On the CPU: in which order things are asked for.


class Log(RecordTable):
    """The experts of a layer, which must have been fetched before they are used."""

    def __init__(self, layer: int, experts: tuple[nn.Module, ...], log: list[tuple[str, int]]):
        self.layer, self.experts, self.log, self.there = layer, experts, log, set[int]()

    def fetch(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> "LogFetch":
        return LogFetch(self, ids_MA)

    def decode(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, units_MA: Tensor | None = None) -> Tensor:
        assert set(ids_MA.flatten().tolist()) <= self.there, "used before they came"
        self.log.append(("used", self.layer))
        return moe4(y_MD, ids_MA, weights_MA, self.experts).float()[None]

    def __call__(self, x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
        return moe4(x_MD, ids_MA, weights_MA, self.experts)[None]


class LogFetch:
    def __init__(self, table: Log, ids: Tensor):
        self.table, self.ids, self.device = table, ids, ids.device

    def prepare(self) -> None: ...

    def left(self) -> tuple[None, None]:
        return None, None

    def run(self) -> None:
        self.table.log.append(("came", self.table.layer))
        self.table.there = set(self.ids.flatten().tolist())


def test_a_step_pauses_before_every_layers_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "unfused", lambda model: None)
    plain, paused, log = make_model(eos_token_id=None), make_model(eos_token_id=None), []
    for index, layer in enumerate(paused.layers):
        layer.moe.packed = Log(index, layer.moe.table, log)
    ids = torch.arange(3, 24).view(1, -1)
    assert torch.equal(followed(paused, ids, 5), followed(plain, ids, 5))
    layers = len(paused.layers)
    assert log == [(what, layer) for _ in range(16) for layer in range(layers) for what in ("came", "used")]


class Seen(OffloadedTable):
    """Without the kernels: what they would find."""

    def look(self, ids: Tensor) -> None:
        held = {expert for layer, expert in self.store._bank.slots.present if layer == self.layer}
        held |= {expert for layer, expert in self.store._bank.resident if layer == self.layer}
        assert set(ids.flatten().tolist()) <= held


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Seen]]:
    monkeypatch.setattr(RecordTable, "__call__", lambda self, x, ids, weights: self.look(ids))
    with make(placement(3, resident=2, pinned=6, disk=0, spare=6)) as store:
        layout = TileLayout.make((16,), 256, "int4", 128, False)
        assert layout is not None
        made = [Seen(store, layer, layout, layout) for layer in range(3)]
        for table, following in pairwise(made):
            table.following = following
        yield made


def test_few_tokens_bring_the_experts_that_they_chose(tables: list[Seen]) -> None:
    ids = torch.tensor([[3, 0], [5, 3]])
    tables[1](torch.zeros(2, 4), ids, torch.ones(2, 2))
    store = tables[1].store
    assert store.stats.misses == 2 and store.stats.hits == 1  # 0 is resident
    assert not store._bank.slots.held


def test_many_tokens_bring_all_and_begin_with_the_next_layers(tables: list[Seen]) -> None:
    ids = torch.randint(8, (8 * ALL_FROM // 2, 2), generator=torch.Generator().manual_seed(0))
    tables[0](torch.zeros(len(ids), 4), ids, torch.ones(ids.shape))
    assert tables[0].store.stats.misses == 6 and not tables[0].store._bank.slots.held
    for table in tables[1:]:
        table(torch.zeros(len(ids), 4), ids, torch.ones(ids.shape))
    assert tables[0].store.stats.bytes_from_host == 18 * RECORD, "each expert comes once"


def test_what_a_step_required_is_given_up_at_the_next_pause(tables: list[Seen]) -> None:
    store = tables[0].store
    for table in tables * 3:
        Fetch(table, torch.tensor([[2, 7]], dtype=torch.int32)).run()
        assert store._bank.held_layers() == {table.layer}
    store.used_all()
    assert not store._bank.slots.held


def test_a_failed_forward_gives_up_its_experts(tables: list[Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(RecordTable, "__call__", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        tables[0](torch.zeros(1, 4), torch.tensor([[3, 4]]), torch.ones(1, 2))
    assert not tables[0].store._bank.slots.held


def test_a_step_that_dies_between_two_pauses_gives_up_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves a state that nobody goes on with, but a snapshot can be restored to."""
    monkeypatch.setattr(graphs, "unfused", lambda model: None)
    model, released = make_model(eos_token_id=None), []

    @contextmanager
    def using(self: MiniMaxForCausalLM) -> Iterator[None]:
        with plain_using(self):
            try:
                yield
            finally:
                released.append(self)

    plain_using = MiniMaxForCausalLM.using_experts
    monkeypatch.setattr(MiniMaxForCausalLM, "using_experts", using)
    ids = torch.arange(3, 24).view(1, -1)
    right = followed(model, ids, 5)
    state = HybridState(model.minibble, reserve=21)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=state)
        saved, plain, before = state.snapshot(), model.layers[1].moe.route, len(released)

        def fail(*args: Any) -> None:
            raise torch.cuda.OutOfMemoryError("no memory")

        model.layers[1].moe.route = fail
        with pytest.raises(torch.cuda.OutOfMemoryError):
            model(ids[:, 5:6], past_key_values=state)
        assert len(released) == before + 1 and state.broken
        model.layers[1].moe.route = plain
        for tokens in (1, 3):  # as a step, and as a prompt
            with pytest.raises(StateError, match="restore an earlier snapshot"):
                model(ids[:, 5 : 5 + tokens], past_key_values=state)
        state.restore(saved)
        logits = torch.cat([model(ids[:, t : t + 1], past_key_values=state).logits for t in range(5, 21)], dim=1)
    assert torch.equal(logits, right[:, 5:])


def test_one_thread_at_a_time() -> None:
    turns, order = Turns(), []

    def work(name: str) -> None:
        with turns.take([CPU]), turns.take([CPU]):  # a forward within a forward is the same turn
            order.append((name, "in"))
            time.sleep(0.02)
            order.append((name, "out"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(order[i][0] == order[i + 1][0] and order[i][1] == "in" for i in range(0, 6, 2))
    assert copy.deepcopy(turns) is not turns


# On GPUs: the built-in model.


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("prompt", [3, 150])
def test_logits_are_those_of_the_resident_model(
    cuda_device: torch.device, demo_nf4: Path, tmp_path: Path, where: str, prompt: int
) -> None:
    ids = torch.randint(4, 2000, (3, prompt + 30), generator=torch.Generator().manual_seed(prompt)).to(cuda_device)
    mask = torch.ones(3, prompt, dtype=torch.long, device=cuda_device)
    mask[1, : prompt // 2] = 0
    right = followed(minibble.load(demo_nf4, device=cuda_device), ids, prompt, mask)
    record = minibble.load(demo_nf4, device=cuda_device).placement.record_bytes  # type: ignore[union-attr]
    tiers: dict[str, Any] = {"offload_folder": tmp_path, "host_memory": 6 * record} if where == "disk" else {}
    model = minibble.load(
        demo_nf4, device=cuda_device, gpu_memory=short_of(demo_nf4, 0.6), prefill_chunk=CHUNK, **tiers
    )
    try:
        assert torch.equal(followed(model, ids, prompt, mask), right)
        stats = model.stores[0].stats
        assert stats.misses and stats.evictions and (stats.bytes_from_disk > 0) == (where == "disk")
        assert model.decode_path() == {"eager": 1, "graph": 29}
        report = model.memory_report(context=200, batch=3)
        assert (report["measured"]["disk_bytes"] > 0) == (where == "disk")
        assert model.embedding.elsewhere == (where == "host") == (report["predicted"]["embedding"] == "host")
        assert report["measured"]["host_bytes"] == pytest.approx(report["predicted"]["host_bytes"], rel=0.1)
    finally:
        model.close()


@pytest.mark.gpu
def test_one_sequence_reads_experts_where_they_wait(cuda_device: torch.device, demo_nf4: Path) -> None:
    """In one graph, with no request to the store after the prompt: the same logits to the bit."""
    ids = torch.randint(4, 2000, (1, 70), generator=torch.Generator().manual_seed(5)).to(cuda_device)
    right = followed(minibble.load(demo_nf4, device=cuda_device), ids, 40)
    model = minibble.load(demo_nf4, device=cuda_device, gpu_memory=short_of(demo_nf4, 0.6), prefill_chunk=CHUNK)
    try:
        state = HybridState(model.minibble, reserve=80)
        with torch.inference_mode():
            logits = [model(ids[:, :40], past_key_values=state).logits]
            before = model.stores[0].stats
            logits += [model(ids[:, t : t + 1], past_key_values=state).logits for t in range(40, 70)]
        assert torch.equal(torch.cat(logits, dim=1), right)
        stats = model.stores[0].stats.since(before)
        offloaded = sum(layer.moe.packed._missing > 0 for layer in model.layers)  # type: ignore[union-attr]
        assert stats.in_place == stats.misses > 0 and not stats.evictions and not stats.device_stall_s
        assert stats.hits + stats.misses == 30 * offloaded * model.minibble.experts_per_token
        assert stats.bytes_from_host == stats.misses * model.stores[0].record_nbytes
        assert len(state.bound.graphs) == 1  # type: ignore[union-attr]
    finally:
        model.close()


@pytest.mark.gpu
def test_less_and_less_memory(cuda_device: torch.device, demo_nf4: Path) -> None:
    """Down to the least with which the plan says it works; below, an error that says what would do."""
    ids = torch.randint(4, 2000, (1, 60), generator=torch.Generator().manual_seed(1)).to(cuda_device)
    right = followed(minibble.load(demo_nf4, device=cuda_device), ids, 40)
    worked = 0
    for share in (0.2, 0.5, 0.8, 0.95, 1.0):
        try:
            model = minibble.load(
                demo_nf4, device=cuda_device, gpu_memory=short_of(demo_nf4, share), prefill_chunk=CHUNK
            )
        except BudgetError as error:
            assert "would do" in str(error)
            break
        assert torch.equal(followed(model, ids, 40), right)
        model.close()
        worked += 1
    assert worked >= 3


@pytest.mark.gpu
def test_generation_cancelled_in_the_middle(cuda_device: torch.device, demo_nf4: Path) -> None:
    """What was held is given up with the next step, and the next request is right."""
    model = minibble.load(demo_nf4, device=cuda_device, gpu_memory=short_of(demo_nf4, 0.6), prefill_chunk=CHUNK)
    ids = torch.randint(4, 2000, (1, 40), generator=torch.Generator().manual_seed(2)).to(cuda_device)
    right = followed(model, ids, 20)

    class Stop:
        def put(self, value: Tensor) -> None:
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen > 5:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=50, min_new_tokens=50, do_sample=False, streamer=Stop())
    assert torch.equal(followed(model, ids, 20), right)
    model.close()


@pytest.mark.gpu
def test_a_damaged_file_and_then_a_new_request(cuda_device: torch.device, demo_nf4: Path, tmp_path: Path) -> None:
    record = minibble.load(demo_nf4, device=cuda_device).placement.record_bytes  # type: ignore[union-attr]
    model = minibble.load(
        demo_nf4,
        device=cuda_device,
        gpu_memory=short_of(demo_nf4, 0.6),
        prefill_chunk=CHUNK,
        host_memory=5 * record,
        offload_folder=tmp_path,
    )
    ids = torch.randint(4, 2000, (1, 40), generator=torch.Generator().manual_seed(3)).to(cuda_device)
    right = followed(model, ids, 20)
    (path,) = tmp_path.iterdir()
    times = path.stat()
    path.touch()
    with pytest.raises(CheckpointError, match="changed or replaced"):
        followed(model, ids, 20)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(followed(model, ids, 20), right)
    model.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_memory_runs_out_in_the_middle(
    cuda_device: torch.device, demo_nf4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = minibble.load(demo_nf4, device=cuda_device, gpu_memory=short_of(demo_nf4, 0.6), prefill_chunk=CHUNK)
    ids = torch.randint(4, 2000, (4, 40), generator=torch.Generator().manual_seed(4)).to(cuda_device)
    right = followed(model, ids, 20)
    plain, calls = ExpertStore.require, []

    def fail_once(self: ExpertStore, layer: int, *wanted: Any) -> None:
        calls.append(layer)
        if len(calls) == 30:
            raise torch.cuda.OutOfMemoryError("no memory")
        plain(self, layer, *wanted)

    monkeypatch.setattr(ExpertStore, "require", fail_once)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        followed(model, ids, 20)
    assert torch.equal(followed(model, ids, 20), right)
    model.close()


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [16, 4096])
def test_layers_on_two_gpus(cuda_device: torch.device, demo_nf4: Path, chunk: int) -> None:
    """The same kernels in the same order: the same bits. Steps are graphs on both, prompts go in pieces."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    from minibble.quantize.checkpoint import Checkpoint
    from minibble.runtime.layout import by_module

    one = minibble.load(demo_nf4, device=cuda_device)
    checkpoint = Checkpoint.open(demo_nf4)
    L = checkpoint.config.num_hidden_layers
    unfilled = Unfilled.on(checkpoint, [torch.device("cuda", int(2 * i >= L)) for i in range(L)])
    for module, names in by_module(checkpoint.config):
        specs = [checkpoint.specs[name] for name in names]
        unfilled.fill(module, specs, [checkpoint.read(spec) for spec in specs])
    two = unfilled.filled()
    one.prefill_chunk = two.prefill_chunk = chunk
    two.generation_config = one.generation_config
    ids = torch.randint(4, 2000, (3, 90), generator=torch.Generator().manual_seed(5)).to(cuda_device)
    mask = torch.ones(3, 70, dtype=torch.long, device=cuda_device)
    mask[1, :33] = 0
    for given in (None, mask):
        assert torch.equal(followed(two, ids, 70, given), followed(one, ids, 70, given))
    assert two.decode_path() == {"eager": 2, "graph": 38}
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    assert torch.equal(two.generate(ids[:, :70], **settings), one.generate(ids[:, :70], **settings))
