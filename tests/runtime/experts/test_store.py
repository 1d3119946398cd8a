"""Stores on the CPU: what is where, what is counted, what is refused."""

import gc
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden.expert_stores import CPU, RECORD, absent, check_required, content, fill, groups, make, placement

from minibble.quantize.errors import BudgetError, CheckpointError, ConfigError
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.tiering import Tiering

MIXED = placement(layers=3, resident=2, pinned=3, disk=3, spare=4, first=1, step=7)


def test_every_expert_comes_back_byte_for_byte(tmp_path: Path) -> None:
    """Layers 1, 8 and 15; all experts of all tiers, in turn and then again."""
    with make(MIXED, tmp_path) as store:
        for _ in range(2):
            for layer in (1, 8, 15):
                for ids in ([0, 5, 7], [1, 2, 3, 4, 6]):
                    store.require(layer, ids)
                    check_required(store, layer, ids)
                    store.used(layer)
        stats = store.stats
        assert stats.hits + stats.misses == 2 * 3 * 8 and stats.hits >= 2 * 3 * 2
        assert (stats.bytes_from_host + stats.bytes_from_disk) == stats.misses * RECORD


def test_memory_is_what_was_planned(tmp_path: Path) -> None:
    with make(MIXED, tmp_path) as store:
        assert store.device_nbytes == (3 * 2 + 4 + 1) * RECORD + 3 * 8 * 8
        assert store.host_nbytes == 3 * 3 * RECORD + 4 * 4096
        assert store.disk_nbytes == 3 * 3 * 4096
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size == store.disk_nbytes


def test_all_resident_needs_nothing_else() -> None:
    where = placement(layers=2, resident=4, pinned=0, disk=0, spare=0)
    with make(where) as store:
        assert store.device_nbytes == 8 * RECORD + 2 * 4 * 8
        assert store.host_nbytes == 0 and not store.poison_address
        store.require(1, [3, 0])
        check_required(store, 1, [3, 0])
        assert not absent(store, 1, torch.tensor([[3, 0]])).any()
        store.used(1)
        assert list(groups(store, 0, [2, 1])) == [[2, 1]]
        assert store.stats.hits == 4 and store.stats.misses == 0


def test_the_table_stays_in_its_place_and_says_what_is_absent() -> None:
    with make(placement(layers=2, resident=1, pinned=3, disk=0, spare=1)) as store:
        table = store.addresses(1)
        for expert in (1, 2, 3):
            store.require(1, [expert])
            assert store.addresses(1).data_ptr() == table.data_ptr()
            others = [other for other in (1, 2, 3) if other != expert]
            assert all(int(table[other]) == store.poison_address for other in others)
            gone = absent(store, 1, torch.tensor([[0, expert], others], dtype=torch.int32))
            assert gone.tolist() == [[False, False], [True, True]]
            store.used(1)
        assert (store.addresses(0)[1:] == store.poison_address).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_absent_computes_nan(dtype: torch.dtype) -> None:
    with make(placement(layers=1, resident=1, pinned=1, disk=0, spare=1)) as store:
        poison = store._bank.records[-1]
        assert poison.data_ptr() == store.poison_address
        assert poison.view(dtype).isnan().all()


def test_more_than_the_slots(tmp_path: Path) -> None:
    with make(MIXED, tmp_path) as store:
        store.require(8, [2])
        store.used(8)
        with pytest.raises(BudgetError, match=r"5 experts of layer 1 must come, 4 of 4 slots are free for them"):
            store.require(1, [0, 2, 3, 4, 5, 6])
        assert not store._bank.slots.held
        store.require(1, [0, 1, 2, 3, 4, 5])
        check_required(store, 1, [0, 1, 2, 3, 4, 5])


def test_what_is_held_does_not_go(tmp_path: Path) -> None:
    with make(MIXED, tmp_path) as store:
        store.require(1, [2, 5])
        store.prefetch(8, [2, 3, 4, 5, 6])
        store.require(8, [2, 3])
        check_required(store, 1, [2, 5])
        check_required(store, 8, [2, 3])
        with pytest.raises(BudgetError, match="1 experts of layer 15 must come, 0 of 4"):
            store.require(15, [2])
        store.used(1)
        store.require(15, [2, 7])
        check_required(store, 8, [2, 3])
        check_required(store, 15, [2, 7])


@pytest.mark.parametrize("spare", [1, 2, 3, 4, 7, 30])
def test_groups_bring_each_expert_once(tmp_path: Path, spare: int) -> None:
    with make(placement(layers=2, resident=2, pinned=3, disk=3, spare=spare), tmp_path) as store:
        for layer in (0, 1, 0):
            before, seen = store.stats, []
            for group in groups(store, layer, [7, 0, 3, 3, 2, 5, 6]):
                check_required(store, layer, group)
                seen += group
            assert sorted(seen) == [0, 2, 3, 5, 6, 7]
            since = store.stats.since(before)
            assert since.bytes_from_host + since.bytes_from_disk == since.misses * RECORD
            assert since.hits + since.misses == 6 and since.prefetched == 0
        assert not store._bank.slots.held


def test_groups_that_are_left_early_hold_nothing(tmp_path: Path) -> None:
    with make(MIXED, tmp_path) as store:
        for _ in groups(store, 1, range(8)):
            break
        gc.collect()
        assert not store._bank.slots.held
        store.require(8, [2, 3, 4, 5])
        check_required(store, 8, [2, 3, 4, 5])


def test_prefetch_is_counted_and_serves(tmp_path: Path) -> None:
    with make(MIXED, tmp_path) as store:
        store.require(1, [2, 3, 4])  # so that nothing of layer 8 is left in the slots
        store.used(1)
        before = store.stats
        store.prefetch(8, [0, 2, 3, 2])
        assert store.stats.since(before).prefetched == 2
        assert absent(store, 8, torch.tensor([2, 3])).all()  # no kernel may read them before they are required
        store.require(8, [0, 2, 4])
        check_required(store, 8, [0, 2, 4])
        store.used(8)
        store.require(8, [2])
        since = store.stats.since(before)
        assert (since.hits, since.misses, since.predicted_right) == (3, 1, 1)
        assert since.to_json()["hit_rate"] == 0.75


def test_a_wrong_guess_is_never_counted_as_right() -> None:
    with make(placement(layers=1, resident=0, pinned=4, disk=0, spare=1)) as store:
        store.prefetch(0, [1])
        for expert in (2, 2, 1, 1):
            store.require(0, [expert])
            store.used(0)
        assert (store.stats.prefetched, store.stats.predicted_right) == (1, 0)


def test_the_next_group_comes_while_one_is_computed() -> None:
    with make(placement(layers=2, resident=2, pinned=6, disk=0, spare=4)) as store:
        store.require(1, [2, 3, 4, 5])
        store.used(1)
        coming = []
        for group in groups(store, 0, range(8)):
            coming.append([e for e in range(2, 8) if e not in group and store._bank.is_here((0, e))])
        assert coming == [[2, 3], [4, 5], [6, 7], [4, 5]]


def test_the_least_recently_used_goes() -> None:
    with make(placement(layers=1, resident=0, pinned=5, disk=0, spare=3)) as store:
        for ids in ([0], [1], [2], [0], [3]):
            store.require(0, ids)
            store.used(0)
        assert absent(store, 0, torch.arange(5)).tolist() == [False, True, False, False, True]
        assert store.stats.evictions >= 1


def test_what_is_not_filled_is_named() -> None:
    store = ExpertStore(CPU, RECORD, placement(layers=2, resident=1, pinned=1, disk=0, spare=1))
    store.put(0, 0)
    store.done(0, 0)
    with pytest.raises(CheckpointError, match="3 of 4 experts were not filled, the first is expert 1 of layer 0"):
        store.seal()
    store.close()


def test_several_open_at_once_as_slots_are_spare() -> None:
    with ExpertStore(CPU, RECORD, placement(layers=1, resident=1, pinned=4, disk=0, spare=2)) as store:
        first, second = store.put(0, 1), store.put(0, 2)
        assert first.data_ptr() != second.data_ptr() and store.put(0, 1).data_ptr() == first.data_ptr()
        with pytest.raises(BudgetError, match="all 2 slots are in use"):
            store.put(0, 3)
        store.done(0, 1)
        store.put(0, 3)


@pytest.mark.parametrize(
    ("tiers", "text"),
    [
        (({}, {}, {}, 0), "no layer"),
        (({0: [0, 1]}, {0: [1]}, {}, 1), r"layer 0: found experts \[0, 1, 1\]"),
        (({0: [0, 1], 1: [0]}, {}, {}, 0), r"layer 1: found experts \[0\], expected each of 0 to 1"),
        (({0: [0]}, {0: [1]}, {}, 0), "1 experts wait off the device and 0 slots are spare"),
    ],
)
def test_placements_that_cannot_be(tiers: tuple[dict, dict, dict, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ExpertStore(CPU, RECORD, Tiering(*tiers))


def test_disk_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="name a folder"):
        ExpertStore(CPU, RECORD, placement(layers=1, resident=1, pinned=0, disk=1, spare=1))


def test_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        store = make(MIXED, tmp_path)
    store.require(1, [2, 6])
    check_required(store, 1, [2, 6])
    with torch.inference_mode():
        store.require(8, [3, 7])
        check_required(store, 8, [3, 7])
    store.used(1)
    store.used(8)
    store.require(15, [3, 7])
    store.close()


@pytest.mark.parametrize("let_go", [ExpertStore.close, lambda store: None], ids=["closed", "dropped"])
def test_the_file_goes(tmp_path: Path, let_go: Callable[[ExpertStore], None]) -> None:
    store = make(MIXED, tmp_path)
    store.prefetch(1, [5, 6, 7])
    assert len(list(tmp_path.iterdir())) == 1
    let_go(store)
    let_go(store)
    del store
    gc.collect()
    for _ in range(100):
        if not list(tmp_path.iterdir()):
            return
        torch.rand(100, 100).mm(torch.rand(100, 100))  # a read under way ends first
    assert not list(tmp_path.iterdir())


def test_records_of_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory of several pieces, and reads of several pieces, the last of each shorter."""
    from minibble.runtime.experts import disk, host

    nbytes = 256 * 301
    monkeypatch.setattr(disk, "PIECE_NBYTES", 8192)
    monkeypatch.setattr(host, "PIECE_NBYTES", 3 * nbytes + 5)
    with make(placement(layers=1, resident=1, pinned=7, disk=5, spare=2), tmp_path, nbytes=nbytes) as store:
        assert store.host_nbytes == 7 * nbytes + 4 * math.ceil(nbytes / 4096) * 4096
        for group in groups(store, 0, range(13)):
            check_required(store, 0, group)


def test_filling_again_is_refused(tmp_path: Path) -> None:
    store = make(MIXED, tmp_path)
    with pytest.raises(AssertionError, match="has been filled"):
        store.put(1, 0)
    with pytest.raises(AssertionError, match="was not required"):
        store.record(1, 4)
    store.close()
    with pytest.raises(AssertionError, match="before it is closed"):
        store.require(1, [0])
    fresh = fill(ExpertStore(CPU, RECORD, MIXED, tmp_path))
    assert torch.equal(fresh.record(1, 0), content((1, 0), RECORD))
    fresh.close()
