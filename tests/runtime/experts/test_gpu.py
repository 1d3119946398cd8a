"""On a GPU: experts that come while kernels, some of them slow, read others."""

import random
from pathlib import Path

import pytest
import torch
from golden.expert_stores import absent, check_required, content, fill, groups, placement
from torch import Tensor

from minibble.runtime.experts.host import HostRecords
from minibble.runtime.experts.lanes import CudaLane
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.tiering import Tiering

pytestmark = pytest.mark.gpu

NBYTES = 4 << 20
LAYERS, EXPERTS = 4, 8
SLOW = 3_000_000  # cycles, some 2 ms: a copy takes 0.1


class Reader:
    """Kernels that read experts through the table only; `wrong` counts bytes that were not those expected."""

    def __init__(self, store: ExpertStore):
        self.store, self.records = store, store._bank.records
        self.expected = {
            (layer, e): content((layer, e), NBYTES, store.device) for layer in range(LAYERS) for e in range(EXPERTS)
        }
        self.wrong = torch.zeros((), dtype=torch.int64, device=store.device)

    def read(self, layer: int, ids: list[int]) -> None:
        """Issue it; the host waits for nothing."""
        for expert in ids:
            place = (self.store.addresses(layer)[expert : expert + 1] - self.records.data_ptr()) // NBYTES
            found = self.records.index_select(0, place)[0]
            self.wrong += (found != self.expected[layer, expert]).sum()


def filled(device: torch.device, where: Tiering, folder: Path | None = None) -> ExpertStore:
    return fill(ExpertStore(device, NBYTES, where, folder))


@pytest.mark.parametrize("tier", ["pinned", "disk"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_traffic(cuda_device: torch.device, tmp_path: Path, tier: str, seed: int) -> None:
    pinned, disk = (6, 0) if tier == "pinned" else (3, 3)
    where = placement(LAYERS, resident=2, pinned=pinned, disk=disk, spare=5)
    chance = random.Random(seed)
    with filled(cuda_device, where, tmp_path) as store:
        reader = Reader(store)
        for _ in range(150 if tier == "pinned" else 60):
            layer = chance.randrange(LAYERS)
            ids = chance.sample(range(EXPERTS), chance.randint(1, 3))
            store.require(layer, ids)
            if chance.random() < 0.5:
                torch.cuda._sleep(chance.randrange(SLOW))
            if chance.random() < 0.5:
                store.prefetch((layer + 1) % LAYERS, chance.sample(range(EXPERTS), 2))
            reader.read(layer, ids)
            store.used(layer)
            if chance.random() < 0.1:
                for group in groups(store, layer, range(EXPERTS)):
                    torch.cuda._sleep(chance.randrange(SLOW))
                    reader.read(layer, group)
        assert int(reader.wrong) == 0
        stats = store.stats
        assert stats.misses > 50 and stats.predicted_right and stats.evictions and not stats.failed_reads
        for layer in range(LAYERS):
            for group in groups(store, layer, range(EXPERTS)):
                check_required(store, layer, group)


def test_a_missing_wait_would_show(cuda_device: torch.device) -> None:
    """The same with copies that do not wait for the kernels: wrong bytes are read."""
    with filled(cuda_device, placement(LAYERS, resident=0, pinned=8, disk=0, spare=2)) as store:
        reader, bring = Reader(store), store._bank.lane.bring
        store._bank.lane.bring = lambda slot, source, after: bring(slot, source, None)  # type: ignore[method-assign]
        for step in range(10):
            store.require(step % LAYERS, [step % 8, (step + 1) % 8])
            torch.cuda._sleep(SLOW)
            reader.read(step % LAYERS, [step % 8, (step + 1) % 8])
            store.used(step % LAYERS)
        assert int(reader.wrong) > 0


def test_the_host_does_not_wait(cuda_device: torch.device) -> None:
    """Requests return while the device still works on what was issued long before."""
    with filled(cuda_device, placement(LAYERS, resident=2, pinned=6, disk=0, spare=6)) as store:
        store.require(0, [2])
        store.used(0)
        torch.cuda.synchronize()
        end = torch.cuda.Event()
        torch.cuda._sleep(100 * SLOW)
        end.record()
        for layer in range(LAYERS):
            store.require(layer, [0, 3, 4])
            store.used(layer)
            store.prefetch((layer + 1) % LAYERS, [5])
        assert not end.query() and store.stats.stall_s == 0
        torch.cuda.synchronize()
        assert store.stats.device_stall_s > 0


def test_graphs_read_the_table(cuda_device: torch.device) -> None:
    """One graph, captured once, follows the experts from slot to slot; what was not required gives poison."""
    where = placement(LAYERS, resident=1, pinned=7, disk=0, spare=3)
    with filled(cuda_device, where) as store:
        records, base = store._bank.records, store._bank.records.data_ptr()
        ids = torch.zeros(2, dtype=torch.int64, device=cuda_device)
        out = torch.zeros(2, NBYTES, dtype=torch.uint8, device=cuda_device)

        def step() -> None:
            torch.index_select(records, 0, (store.addresses(2)[ids] - base) // NBYTES, out=out)

        stream = torch.cuda.Stream(cuda_device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for pair in ([0, 1], [2, 3], [4, 5], [1, 7], [6, 2], [3, 1]):
            store.require(2, pair)
            ids.copy_(torch.tensor(pair))
            graph.replay()
            store.used(2)
            for row, expert in enumerate(pair):
                assert torch.equal(out[row], content((2, expert), NBYTES, cuda_device))
        gone = [expert for expert in range(1, 8) if not store._bank.is_here((2, expert))][:2]
        ids.copy_(torch.tensor(gone))
        graph.replay()
        assert absent(store, 2, ids).all() and (out == 0xFF).all()


def test_host_memory_is_pinned_and_given_back(cuda_device: torch.device) -> None:
    lane = CudaLane(cuda_device)
    memory = HostRecords(lane, NBYTES, 5)
    assert all(record.is_pinned() for record in memory.records)
    piece: Tensor = memory._pieces[0]
    refusal = lane.pin(piece)  # it is pinned already
    assert refusal is not None and "error" in refusal
    assert int(torch.ones(3, device=cuda_device).sum()) == 3, "the refusal is blamed on the next launch"
    memory.close()
    assert not piece.is_pinned()


def test_device_memory_is_what_was_planned_and_comes_back(cuda_device: torch.device, tmp_path: Path) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(cuda_device)
    store = filled(cuda_device, placement(LAYERS, resident=2, pinned=3, disk=3, spare=5), tmp_path)
    assert store._bank.records.nbytes == (LAYERS * 2 + 5 + 1) * NBYTES
    assert 0 <= torch.cuda.memory_allocated(cuda_device) - before - store.device_nbytes < 4096
    store.prefetch(0, range(EXPERTS))
    store.close()
    assert torch.cuda.memory_allocated(cuda_device) - before < 4096
    assert not list(tmp_path.iterdir())
