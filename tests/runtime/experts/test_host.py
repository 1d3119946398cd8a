"""Host memory in pieces, and the count of what is available."""

import gc
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from minibble.runtime.experts import host
from minibble.runtime.experts.host import HostRecords, available_nbytes
from minibble.runtime.experts.lanes import HostLane


class Counting(HostLane):
    def __init__(self) -> None:
        self.pinned: list[tuple[int, int]] = []
        self.finished = 0

    def pin(self, memory: torch.Tensor) -> str | None:
        assert not memory.any(), "pages are zero before they are written to"
        self.pinned.append((memory.data_ptr(), memory.nbytes))
        return None

    def unpin(self, memory: torch.Tensor) -> None:
        assert self.finished, "copies may still be reading it"
        self.pinned.remove((memory.data_ptr(), memory.nbytes))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize(("count", "each"), [(0, 3), (1, 3), (3, 3), (4, 3), (11, 3), (5, 1)])
def test_pieces_hold_whole_records(monkeypatch: pytest.MonkeyPatch, count: int, each: int) -> None:
    nbytes = 3 * 4096
    monkeypatch.setattr(host, "PIECE_NBYTES", each * nbytes + 4095)
    lane = Counting()
    memory = HostRecords(lane, nbytes, count)
    assert len(memory.records) == count and memory.short is None and memory.nbytes == count * nbytes
    assert sorted(size for _, size in lane.pinned) == sorted(
        [each * nbytes] * (count // each) + [count % each * nbytes] * (count % each > 0)
    )
    addresses = {record.data_ptr() for record in memory.records}
    assert len(addresses) == count and not any(address % 4096 for address in addresses)
    memory.close()
    memory.close()
    assert not lane.pinned and not memory.records and not memory.nbytes


def test_what_is_dropped_is_given_back() -> None:
    lane = Counting()
    memory = HostRecords(lane, 4096, 3)
    assert lane.pinned
    del memory
    gc.collect()
    assert not lane.pinned


def test_a_piece_larger_than_a_page_is_touched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads, ranges of unequal size; 5 MiB are no multiple of what they share."""
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(7)))
    memory = HostRecords(Counting(), 5 << 20, 2)
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    memory.records[0].fill_(1)
    memory.records[1].fill_(2)
    assert int(Path("/proc/self/statm").read_text().split()[1]) - resident < 256, "pages were there already"
    memory.close()


def test_memory_that_runs_out_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3]

    def available() -> int:
        left[0] -= 1
        return 1 << 40 if left[0] >= 0 else 0

    monkeypatch.setattr(host, "PIECE_NBYTES", 4096)
    monkeypatch.setattr(host, "available_nbytes", available)
    memory = HostRecords(Counting(), 4096, 9)
    assert len(memory.records) == 3 and memory.short == "no more host memory is available"
    memory.close()


def test_pages_that_are_not_counted_yet_are_taken_into_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_nbytes", lambda: host.MARGIN_NBYTES + 10_000)
    touched: Future[int] = Future()
    window = deque([(torch.empty(4_000, dtype=torch.uint8), [touched])])
    assert host._fits(10_000, deque()) and not host._fits(10_001, deque())
    assert host._fits(6_000, window) and not host._fits(6_001, window)
    touched.set_result(0)
    assert host._fits(10_000, window) and not host._fits(10_001, window)


def test_available_memory_obeys_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = available_nbytes()
    assert 0 < machine < 1 << 50
    files = [tmp_path / name for name in ("max", "current", "stat")]
    monkeypatch.setattr(host, "_GROUPS", (tuple(map(str, files)), ("/nowhere/a", "/nowhere/b", "/nowhere/c")))
    for text, expected in (("1000000", 1000000 - 300000 + 50000), ("200000", 0)):
        for path, content in zip(files, (text, "300000", "anon 7\ninactive_file 50000\n"), strict=True):
            path.write_text(content + "\n")
        assert available_nbytes() == expected
    files[0].write_text("max\n")
    assert available_nbytes() > 1 << 28
