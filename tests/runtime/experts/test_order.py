"""Whatever the order of requests, and of what two streams do about them: kernels read the right bytes.

The streams are simulated: work is done late, in any order that the marks allow, so that a missing wait shows.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from golden.expert_stores import RECORD, UnrulyLane, content, fill, groups, placement
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minibble.runtime.experts.lanes import Mark
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.tiering import Key, Tiering

LAYERS, EXPERTS = 3, 6
PINNED = placement(LAYERS, resident=2, pinned=4, disk=0, spare=3)
MIXED = placement(LAYERS, resident=1, pinned=2, disk=3, spare=3)

IDS = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True)
OPS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "hold", "used", "prefetch", "groups", "run"]),
        st.integers(0, LAYERS - 1),
        IDS,
    ),
    min_size=1,
    max_size=40,
)


class Machine:
    """A store and the kernels that use it; `wrong` collects what they read amiss."""

    def __init__(self, where: Tiering, folder: Path | None, lane: UnrulyLane):
        self.lane = lane
        self.store = fill(ExpertStore(content((0, 0), 1).device, RECORD, where, folder, lane))
        self.resident = {(layer, e) for layer, ids in where.resident.items() for e in ids}
        self.held: dict[int, set[int]] = {}
        self.wrong: list[Key] = []

    def kernel(self, layer: int, ids: list[int]) -> None:
        """Issue work that reads experts through the table, each in two halves."""
        table, records = self.store.addresses(layer), self.store._bank.records
        for expert in ids:
            expected = content((layer, expert), RECORD)

            def read(part: slice, expert: int = expert, expected: Tensor = expected) -> None:
                place = (int(table[expert]) - records.data_ptr()) // RECORD
                if not (records[place][part] == expected[part]).all():
                    self.wrong.append((layer, expert))

            for part in (slice(0, RECORD // 2), slice(RECORD // 2, RECORD)):
                self.lane.issue("compute", partial(read, part))

    def do(self, op: str, layer: int, ids: list[int]) -> None:
        coming = {expert for expert in ids if (layer, expert) not in self.resident}
        others = sum(len(held) for other, held in self.held.items() if other != layer)
        room = len(self.store._bank.slots) - others - len(self.held.get(layer, set()) | coming)
        if op in ("step", "hold") and room >= 0:
            self.store.require(layer, ids)
            self.kernel(layer, ids)
            self.held.setdefault(layer, set()).update(coming)
            if op == "step":
                self.release(layer)
        elif op == "used":
            self.release(layer)
        elif op == "prefetch":
            self.store.prefetch(layer, ids)
        elif op == "groups":
            for held in list(self.held):
                self.release(held)
            seen = []
            for group in groups(self.store, layer, range(EXPERTS)):
                self.kernel(layer, group)
                self.lane.run(len(ids))
                seen += group
            assert sorted(seen) == list(range(EXPERTS))
        self.lane.run(len(ids) * 2 if op == "run" else 1)
        self.check()

    def release(self, layer: int) -> None:
        for expert in self.held.get(layer, ()):  # more work on what is held, which must still be there
            self.kernel(layer, [expert])
        self.store.used(layer)
        self.held.pop(layer, None)

    def check(self) -> None:
        """Slots, table and holds agree."""
        bank = self.store._bank
        places = {bank.view(key).data_ptr() for key in bank.slots.present}
        assert len(places) == len(bank.slots.present) == sum(key is not None for key in bank.slots.keys)
        held = {(layer, expert) for layer, ids in self.held.items() for expert in ids}
        assert {bank.slots.keys[slot] for slot in bank.slots.held} == held
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                entry, key = int(bank._entries[layer, expert]), (layer, expert)
                if bank.is_here(key):
                    assert entry in (bank.view(key).data_ptr(), bank.poison)
                else:
                    assert entry == bank.poison
                if key in held or key in self.resident:
                    assert entry == bank.view(key).data_ptr()

    def end(self) -> list[Key]:
        self.lane.finish()
        self.store.close()
        return self.wrong


@settings(max_examples=150, deadline=None)
@given(OPS, st.integers(0, 1 << 30))
def test_kernels_read_the_right_bytes(ops: list[tuple[str, int, list[int]]], seed: int) -> None:
    machine = Machine(PINNED, None, UnrulyLane(seed))
    for op in ops:
        machine.do(*op)
    assert not machine.end()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPS, st.integers(0, 1 << 30))
def test_with_a_disk(tmp_path: Path, ops: list[tuple[str, int, list[int]]], seed: int) -> None:
    machine = Machine(MIXED, tmp_path, UnrulyLane(seed))
    for op in ops:
        machine.do(*op)
    assert not machine.end()
    assert not list(tmp_path.iterdir())


class Overwrites(UnrulyLane):
    """Does not wait for work that still reads a slot."""

    def bring(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        return super().bring(slot, source, None)


class Reads(UnrulyLane):
    """Does not wait for what is still on its way."""

    def wait(self, mark: Mark) -> None: ...


class Forgets(UnrulyLane):
    """Changes the table beside the computing instead of among it."""

    def publish(self, table: Tensor, rows: Tensor, changed: Mapping[tuple[int, int], int]) -> None:
        table.copy_(rows)


class Reuses(UnrulyLane):
    """Takes all copies for ended: buffers are filled anew too early."""

    def passed(self, mark: Mark) -> bool:
        return True


@pytest.mark.parametrize("broken", [Overwrites, Reads, Forgets, Reuses])
def test_a_missing_wait_shows(broken: Any, tmp_path: Path) -> None:
    """The tests above would see it if the store did not wait where it must."""
    where, folder = (MIXED, tmp_path) if broken is Reuses else (PINNED, None)
    wrong = 0
    for seed in range(30):
        machine = Machine(where, folder, broken(seed))
        for number in range(20):
            machine.store.require(layer := number % LAYERS, ids := [(number // LAYERS) % 3 + 3, 5 - number % 2])
            machine.kernel(layer, ids)
            machine.store.used(layer)
            machine.lane.run(2)
        wrong += bool(machine.end())
    assert wrong
