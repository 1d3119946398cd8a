"""Records in host memory, pinned piece by piece.

torch's own pinned memory is rounded up to powers of two, and its pages are touched by one thread; here pieces hold
whole records, are touched by all cores in large pages, and are then registered with the driver as they are: 16 GiB in
0.9 s on 16 cores, where `pin_memory` takes 1.7 s for 4.
"""

import ctypes
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.experts.lanes import Lane

PIECE_NBYTES = 1 << 30  # what a refusal can cost
MARGIN_NBYTES = 1 << 30  # of the machine's memory, left alone
_AHEAD = 2  # pieces touched while one is registered

# Limit and use of a control group, versions 2 and 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


class HostRecords:
    """Up to `count` records of `record_nbytes`, page-aligned where that is a multiple of a page.

    `records` are those that could be pinned, `short` says why there are fewer than asked for. With `pinned=False`
    there are always `count`, in ordinary memory.
    """

    def __init__(self, lane: Lane, record_nbytes: int, count: int, pinned: bool = True):
        self.records: list[Tensor] = []
        self.short: str | None = None
        self._pieces: list[Tensor] = []
        # The pieces outlive this object by as long as it takes to wait for the copies from them.
        self._release = weakref.finalize(self, _release, lane, self._pieces if pinned else [])
        try:
            for piece in _touched(record_nbytes, count, checked=pinned):
                refusal = (lane.pin(piece) if pinned else None) if isinstance(piece, Tensor) else piece
                if refusal is not None:
                    self.short = refusal
                    break
                assert isinstance(piece, Tensor)
                self._pieces.append(piece)
                self.records += piece.view(-1, record_nbytes).unbind()
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    def close(self) -> None:
        """Give the memory back, after the copies from it."""
        self.records.clear()
        self._release()
        self._pieces.clear()


def available_nbytes() -> int:
    """Host memory to be had without swapping or being killed, as the machine and the control group count it."""
    fields = _fields(Path("/proc/meminfo"))
    found = [fields["MemAvailable"] << 10] if "MemAvailable" in fields else []
    for limit, used, stat in _GROUPS:
        with suppress(OSError, ValueError):  # no such control group, or its limit is "max"
            reclaimable = _fields(Path(stat)).get("inactive_file", 0)
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + reclaimable)
    return max(0, min(found)) if found else 1 << 62


def _fields(path: Path) -> dict[str, int]:
    """Names and numbers of a file of the kernel's; none where there is no such file."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _touched(record_nbytes: int, count: int, checked: bool) -> Iterator[Tensor | str]:
    """Pieces with room for `count` records in all, their pages present; a text where memory ends."""
    each = max(1, PIECE_NBYTES // record_nbytes)
    sizes = [min(each, count - first) * record_nbytes for first in range(0, count, each)]
    threads = min(len(os.sched_getaffinity(0)), 16)
    window: deque[tuple[Tensor, list[Future[int]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="touch") as pool:
        while sizes or window:
            while sizes and len(window) <= _AHEAD and (not checked or _fits(sizes[0], window)):
                piece = _mapped(sizes.pop(0))
                window.append((piece, _touch(piece, pool, threads)))
            if not window:
                yield "no more host memory is available"
                return
            piece, work = window.popleft()
            for one in work:
                one.result()
            yield piece


def _fits(nbytes: int, window: "deque[tuple[Tensor, list[Future[int]]]]") -> bool:
    """Whether so much more can be taken; of the pieces in the window some pages may not be counted as used yet."""
    pending = sum(piece.nbytes for piece, work in window if not all(one.done() for one in work))
    return available_nbytes() - pending >= nbytes + MARGIN_NBYTES


def _mapped(nbytes: int) -> Tensor:
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # large pages only make it quicker
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _touch(piece: Tensor, pool: ThreadPoolExecutor, parts: int) -> "list[Future[int]]":
    """Write to all pages, several threads at once: ctypes lets them run beside each other."""
    large = 2 << 20
    ends = [min(piece.nbytes, -(-piece.nbytes * part // parts // large) * large) for part in range(parts)]
    first = piece.data_ptr()
    return [
        pool.submit(lambda a, b: ctypes.memset(first + a, 0, b - a), a, b)
        for a, b in pairwise([*ends, piece.nbytes])
        if a < b
    ]


def _release(lane: Lane, pieces: list[Tensor]) -> None:
    if pieces:
        lane.finish()
        for piece in pieces:
            lane.unpin(piece)
