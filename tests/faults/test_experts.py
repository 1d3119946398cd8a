"""Experts that wait off the GPU while memory is refused, the disk fails, or somebody interrupts.

Each fault is told by name, and what is asked for afterwards is right.
"""

import contextlib
import errno
import fcntl
import itertools
import operator
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from golden.expert_stores import CPU, RECORD, absent, check_required, content, groups, make, placement

from minibble.quantize.errors import BudgetError, CheckpointError
from minibble.runtime.experts import disk, host, tiers
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.experts.store import ExpertStore

ON_DISK = placement(layers=2, resident=1, pinned=0, disk=5, spare=3)
PINNED = placement(layers=2, resident=1, pinned=5, disk=0, spare=3)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Nothing in its slots but the last three experts of layer 1."""
    with make(ON_DISK, tmp_path) as store:
        yield store


def check_all(store: ExpertStore) -> None:
    """Every expert of both layers, in groups and alone."""
    for layer in (0, 1):
        for group in groups(store, layer, range(6)):
            check_required(store, layer, group)
        for expert in range(6):
            store.require(layer, [expert])
            check_required(store, layer, [expert])
            store.used(layer)
    assert not store._bank.slots.held


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., Any], after: int = 0) -> list[int]:
    """Let a call of `os.name` by the store, the one after `after` others, go to `fault`; returns what counts these."""
    right, faults, calls = getattr(os, name), [], itertools.count()

    def call(*arguments: Any) -> Any:
        if next(calls) != after:
            return right(*arguments)
        faults.append(1)
        return fault(*arguments)

    monkeypatch.setattr(os, name, call)
    return faults


def broken(number: int) -> Callable[..., Any]:
    def fault(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fault


@pytest.mark.parametrize(
    ("fault", "text"),
    [(broken(errno.EIO), "Input/output error"), (lambda *arguments: 0, "0 of 4096 bytes at .* were moved")],
    ids=["EIO", "short"],
)
def test_a_failing_read(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], text: str
) -> None:
    assert store._tiers.disk is not None
    fail_once(monkeypatch, "preadv", fault)
    with pytest.raises(CheckpointError, match=f"{store._tiers.disk.path}: expert 2 of layer 0: {text}.*load the model"):
        store.require(0, [0, 2])
    assert store.stats.failed_reads == 1 and not store._bank.slots.held
    assert absent(store, 0, torch.tensor([2])).all()
    store.require(0, [0, 2])
    check_required(store, 0, [0, 2])
    store.used(0)
    check_all(store)


def test_a_failing_read_of_a_prefetch_is_tried_again(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = fail_once(monkeypatch, "preadv", broken(errno.EIO))
    store.prefetch(0, [2])
    while not store.stats.failed_reads:
        store.prefetch(0, [])
    assert faults and absent(store, 0, torch.tensor([2])).all()
    check_all(store)


@pytest.mark.parametrize("most", [4096, 9999])
def test_moved_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A signal may end a read or write early; it goes on from the last whole page, as direct access demands."""
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, data, at: write(fd, [data[0][:8192]], at))

    def part(fd: int, into: list[memoryview], at: int) -> int:
        return min(read(fd, into, at), most)

    monkeypatch.setattr(os, "preadv", part)
    with make(ON_DISK, tmp_path, nbytes=256 * 99) as store:
        tier = store._tiers.disk
        assert tier is not None
        direct = tier.direct
        check_all(store)
        assert tier.direct == direct
        assert store._tiers.disk is not None
        assert store.stats.buffered_reads == 0


def test_a_changed_byte_is_seen(store: ExpertStore) -> None:
    """Even where size and time of the file look untouched."""
    tier = store._tiers.disk
    assert tier is not None
    before = tier.path.stat()
    with open(tier.path, "r+b") as file:
        file.seek(tier.index[(0, 3)] * tier.stride + 77)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(tier.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="expert 3 of layer 0: its checksum is not that of what was written"):
        store.require(0, [2, 3])
    for expert in (0, 1, 2, 4, 5):
        store.require(0, [expert])
        check_required(store, 0, [expert])
        store.used(0)


def test_a_changed_file_is_seen(store: ExpertStore) -> None:
    tier = store._tiers.disk
    assert tier is not None
    with open(tier.path, "ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="expert 1 of layer 0: the file has been changed or replaced"):
        store.require(0, [1])


def test_a_replaced_file_is_seen_and_left_alone(tmp_path: Path) -> None:
    with make(ON_DISK, tmp_path) as store:
        tier = store._tiers.disk
        assert tier is not None
        shutil.copy2(tier.path, tmp_path / "copy")
        os.replace(tmp_path / "copy", tier.path)
        with pytest.raises(CheckpointError, match="expert 1 of layer 0: the file has been changed or replaced"):
            store.require(0, [1])
    assert tier.path.exists()


def test_a_removed_file_is_seen(tmp_path: Path) -> None:
    with make(ON_DISK, tmp_path) as store:
        assert store._tiers.disk is not None
        store._tiers.disk.path.unlink()
        with pytest.raises(CheckpointError, match="expert 1 of layer 0: No such file"):
            store.require(0, [1])


@pytest.mark.parametrize("after", [0, 5, 9])
def test_a_failing_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The first of ten records, one in between, and the last, when nothing is written after it."""
    fail_once(monkeypatch, "pwritev", broken(errno.ENOSPC), after)
    monkeypatch.setattr(disk, "THREADS", 1)
    where = f"expert {1 + after % 5} of layer {after // 5}"
    with pytest.raises(CheckpointError, match=f"{where}: No space left on device"):
        make(ON_DISK, tmp_path)


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(30_000))
    with pytest.raises(CheckpointError, match=r"30\.0 kB are free on this disk, 10 experts need 41\.0 kB; make room"):
        ExpertStore(CPU, RECORD, ON_DISK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file for experts can be made here \(No such file"):
        ExpertStore(CPU, RECORD, ON_DISK, tmp_path / "nowhere")


def test_direct_access_refused_when_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return right(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with (
        pytest.warns(UserWarning, match="direct access is refused"),
        make(ON_DISK, tmp_path) as store,
    ):
        store.require(0, [1, 2])
        assert store.stats.buffered_reads > 0
        check_required(store, 0, [1, 2])
        store.used(0)
        check_all(store)


def test_direct_access_refused_when_read(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = store._tiers.disk
    assert tier is not None
    if not tier.direct:
        pytest.skip("this file system has no direct access")
    assert store.stats.buffered_reads == 0
    fail_once(monkeypatch, "preadv", broken(errno.EINVAL))
    with pytest.warns(UserWarning, match="direct access is refused"):
        store.require(0, [1, 2])
    check_required(store, 0, [1, 2])
    store.used(0)
    check_all(store)
    assert store.stats.buffered_reads > 0 and not tier.direct


class Refusing(HostLane):
    """Pins so many pieces of memory and no more."""

    def __init__(self, pieces: int):
        self.left = self.pieces = pieces
        self.refused = 0
        self.pinned: set[int] = set()

    def pin(self, memory: torch.Tensor) -> str | None:
        if not self.left:
            self.refused += 1
            return "refused here"
        self.left -= 1
        self.pinned.add(memory.data_ptr())
        return None

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned.remove(memory.data_ptr())


@pytest.mark.parametrize("pieces", [0, 2, 5])
@pytest.mark.parametrize("has_disk", [False, True])
def test_pinning_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, has_disk: bool) -> None:
    """One warning says how much; the rest waits on disk or in ordinary memory, and all is given back."""
    monkeypatch.setattr(host, "PIECE_NBYTES", 2 * RECORD)
    lane = Refusing(pieces)
    text = rf"{pieces * 1.0:.1f} kB" if pieces else "0 B"
    where = "disk" if has_disk else "ordinary memory, from where they come several times slower"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = make(PINNED, tmp_path if has_disk else None, lane)
    expected = [] if pieces == 5 else [f"{10 - 2 * pieces} experts wait in {where}"]
    assert [str(w.message).split(": ")[-1] for w in caught] == expected
    assert all(str(w.message).startswith(text) and "refused here" in str(w.message) for w in caught)
    assert lane.refused <= 1 + 4 * has_disk, "asked on after a refusal"
    assert len(lane.pinned) == pieces and (store.disk_nbytes > 0) == (has_disk and pieces < 5)
    check_all(store)
    store.close()
    store.close()
    assert not lane.pinned and not list(tmp_path.iterdir())


def test_the_last_of_each_layer_give_way_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PIECE_NBYTES", 2 * RECORD)
    with pytest.warns(UserWarning, match="6 experts wait in disk"), make(PINNED, tmp_path, Refusing(2)) as store:
        assert sorted(store._tiers.host) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_too_little_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken at all, since the machine would end the process for it."""
    for module in (host, tiers):
        monkeypatch.setattr(module, "available_nbytes", lambda: 4000)
    with pytest.raises(BudgetError, match=r"10 experts have nowhere to wait: they need 5\.1 kB.*4\.0 kB are free"):
        ExpertStore(CPU, RECORD, PINNED)
    with pytest.warns(UserWarning, match="10 experts wait in disk"):
        store = make(PINNED, tmp_path)
    check_all(store)
    store.close()


def test_memory_is_given_back_when_the_store_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Refusing(100)
    where = placement(layers=2, resident=1, pinned=3, disk=2, spare=3)
    monkeypatch.setattr(torch, "full", broken(errno.ENOMEM))
    with pytest.raises(OSError):
        ExpertStore(CPU, RECORD, where, tmp_path, lane)
    assert not lane.pinned and lane.left < 100 and not list(tmp_path.iterdir())


STEPS: list[tuple[str, str]] = [
    ("_tiers", "read"), ("_tiers", "may_read"), ("_bank.slots", "victim"), ("_bank.slots", "drop"),
    ("_bank.slots", "give"), ("_bank.slots", "touch"), ("_bank.lane", "bring"), ("_bank.lane", "wait"),
    ("_bank.lane", "publish"), ("_bank", "_settled"), ("_bank", "_arrive"), ("_bank", "_forget"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name"), STEPS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_cancelled_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, name: str, after: bool, calls: int
) -> None:
    """Interrupted before or after any of its steps: nothing is held, and what is asked for next is right."""
    with make(placement(layers=2, resident=1, pinned=2, disk=3, spare=3), tmp_path) as store:
        owner = operator.attrgetter(part)(store)
        right, left = getattr(owner, name), [1] * calls

        def interrupted(*arguments: Any) -> Any:
            left.pop()
            if left:
                return right(*arguments)
            monkeypatch.setattr(owner, name, right)
            if after:
                right(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            store.require(0, [1, 4, 5])
            store.used(0)
            store.require(0, [2, 3, 1])
            store.used(0)
        assert not store._bank.slots.held
        monkeypatch.setattr(owner, name, right)
        check_all(store)


def test_cancelled_while_waiting(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read goes on; the slot is that expert's, and no other read gets its buffer before it ends."""
    gate, right = threading.Event(), os.preadv

    def slow(*arguments: Any) -> int:
        gate.wait(30)
        return right(*arguments)

    def interrupted(self: tiers.Transfer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", slow)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiers.Transfer, "result", interrupted)
        store.require(0, [1, 2, 3])
    assert not store._bank.slots.held and len(store._tiers._busy) == 3
    store.prefetch(0, [4])  # takes the slot of one of those under way
    store.prefetch(0, [5])  # finds no buffer
    assert len(store._tiers._busy) == 4 and not store._bank.is_here((0, 5))
    gate.set()
    check_all(store)


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    stale, other = tmp_path / "minibble-experts-dead.bin", tmp_path / "minibble-experts-live.bin"
    stale.write_bytes(b"x")
    other.write_bytes(b"y")
    (tmp_path / "mine.bin").write_bytes(b"z")
    with open(other) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with make(ON_DISK, tmp_path), make(ON_DISK, tmp_path):
            assert not stale.exists() and other.exists()
            assert len(list(tmp_path.iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.bin", other.name]


def test_an_unfilled_record_is_never_taken_for_one(tmp_path: Path) -> None:
    """A store whose filling failed cannot be asked."""
    with ExpertStore(CPU, RECORD, ON_DISK, tmp_path) as store:
        store.put(0, 1).copy_(content((0, 1), RECORD))
        store.done(0, 1)
        with pytest.raises(CheckpointError, match="11 of 12 experts were not filled"):
            store.seal()
        with pytest.raises(AssertionError, match="after it is sealed"):
            store.require(0, [1])
