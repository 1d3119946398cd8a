"""Experts read where they wait: addresses, counts, and when that is done. On the CPU, which sees all memory."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden.expert_stores import CPU, RECORD, content, fill, make, placement
from torch import Tensor

from minibble.runtime.experts import host
from minibble.runtime.experts.in_place import InPlace, worthwhile
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.table import Fetch, OffloadedTable
from minibble.runtime.experts.tiering import Tiering
from minibble.runtime.kernels.tiles import TileLayout


class Reaching(HostLane):
    """Kernels find pinned memory where the host does."""

    def reached(self, memory: Tensor) -> int | None:
        return memory.data_ptr()


def record_at(address: int) -> Tensor:
    return torch.frombuffer(bytearray(ctypes.string_at(address, RECORD)), dtype=torch.uint8)


def test_every_expert_of_host_memory_has_an_address() -> None:
    with make(placement(layers=3, resident=2, pinned=4, disk=0, spare=2), lane=Reaching()) as store:
        for layer in range(3):
            readable = store.readable(layer)
            assert readable is not None and readable.far.tolist() == [0, 0, 1, 1, 1, 1]
            for expert, address in enumerate(readable.addresses.tolist()):
                assert torch.equal(record_at(address), content((layer, expert), RECORD))
        before = store.readable(1).addresses.clone()  # type: ignore[union-attr]
        store.require(1, [3, 5])  # brought as well, for a prompt: what is read in place does not change
        assert not torch.equal(store.addresses(1), before)
        assert torch.equal(store.readable(1).addresses, before)  # type: ignore[union-attr]
        store.used(1)


def test_not_from_disk_nor_where_the_device_cannot_read(tmp_path: Path) -> None:
    disk = Tiering({0: [0, 1], 1: [0]}, {0: [2], 1: [1]}, {0: [], 1: [2]}, 2)
    with fill(ExpertStore(CPU, RECORD, disk, tmp_path, Reaching())) as store:
        assert store.readable(0) is not None and store.readable(1) is None
    with make(placement(layers=2, resident=2, pinned=4, disk=0, spare=2)) as store:
        assert store.readable(0) is None


def test_not_from_memory_that_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Reaching):
        def pin(self, memory: Tensor) -> str | None:
            return "refused"

    monkeypatch.setattr(host, "available_nbytes", lambda: 1 << 40)
    with pytest.warns(UserWarning, match="refused"):
        store = make(placement(layers=2, resident=2, pinned=4, disk=0, spare=2), lane=Refusing())
    with store:
        assert store.readable(0) is None


def test_counts_are_among_the_stores() -> None:
    with make(placement(layers=2, resident=2, pinned=4, disk=0, spare=2), lane=Reaching()) as store:
        store.require(0, [0, 3])
        store.used(0)
        before, readable = store.stats, store.readable(0)
        assert readable is not None
        readable.counts.add_(torch.tensor([5, 3]))
        found = store.stats.since(before)
        assert (found.hits, found.misses, found.in_place) == (5, 3, 3) and found.bytes_from_host == 3 * RECORD
        assert store.stats.since(before) == found, "asking changes nothing"


@pytest.mark.parametrize(
    ("choices", "missing", "expected"),
    [(2, 0, False), (2, 13, True), (2, 32, True), (4, 16, True), (4, 17, False), (64, 1, True), (64, 2, False)],
)
def test_few_misses_a_layer_are_read_in_place(choices: int, missing: int, expected: bool) -> None:
    assert worthwhile(choices, missing, 32) is expected


class Read(OffloadedTable):
    """Without the kernels: which addresses they would be given."""

    seen: Tensor | None = None

    def read(self, addresses_E: Tensor, *given: Tensor | None) -> Tensor:
        self.seen = addresses_E
        return torch.zeros(1)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    from minibble.runtime.kernels.moe4 import reads

    monkeypatch.setattr(reads, "count_reads", lambda ids, far, counts: counts.add_(torch.tensor([0, ids.numel()])))
    with make(placement(layers=2, resident=4, pinned=4, disk=0, spare=4), lane=Reaching()) as store:
        layout = TileLayout.make((16,), 256, "int4", 128, False)
        assert layout is not None
        yield Read(store, 1, layout, layout)


def chosen(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.arange(2 * rows).view(rows, 2).int() % 8
    return torch.zeros(rows, 4).bfloat16(), ids, torch.ones(rows, 2)


def test_steps_of_few_choices_do_not_pause(table: Read) -> None:
    """Half of the experts are missing: two sequences are read in place, three are not."""
    for rows in (1, 2):
        assert table.fetch(*chosen(rows)) is None
        table.decode(*chosen(rows))
        assert table.seen is not None and table.seen.data_ptr() == table.store.readable(1).addresses.data_ptr()  # type: ignore
        table(*chosen(rows))  # as the last tokens of a prompt
    assert table.store.stats.in_place == 2 * (2 + 4) and not table.store._bank.slots.held
    assert isinstance(table.fetch(*chosen(3)), Fetch)
    table.decode(*chosen(3))
    assert table.seen is not None and table.seen.data_ptr() == table.addresses.data_ptr()


def test_full_layers_have_nothing_to_count() -> None:
    with make(placement(layers=1, resident=8, pinned=0, disk=0, spare=0), lane=Reaching()) as store:
        layout = TileLayout.make((16,), 256, "int4", 128, False)
        assert layout is not None
        full = Read(store, 0, layout, layout)
        assert full.fetch(*chosen(1)) is None and full._readable(chosen(1)[1]) is None
        full(*chosen(1))
        assert full.seen is not None and full.seen.data_ptr() == full.addresses.data_ptr() and not store.stats.hits


def test_layers_that_lack_an_address_are_left_out() -> None:
    tiering = placement(layers=2, resident=1, pinned=1, disk=0, spare=1)
    found = InPlace(CPU, tiering, {(0, 0): 8, (1, 0): 16}, {(0, 1): 24})
    assert found.of(0) is not None and found.of(1) is None and found.counted() == (0, 0)
