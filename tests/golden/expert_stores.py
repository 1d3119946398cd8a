"""Stores of experts whose bytes are known, and the two streams of a GPU as a slow and unruly machine runs them."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.runtime.experts.lanes import HostLane, Lane, Mark
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.tiering import Key, Tiering

RECORD = 512
CPU = torch.device("cpu")


def content(key: Key, nbytes: int, device: torch.device = CPU) -> Tensor:
    """The record of an expert: other bytes than any other's."""
    generator = torch.Generator(device).manual_seed(1 + key[0] * 1000 + key[1])
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device, generator=generator)


def placement(layers: int, resident: int, pinned: int, disk: int, spare: int, first: int = 0, step: int = 1) -> Tiering:
    """So many experts of each layer in each tier; layers are numbered from `first` in steps."""
    ids = range(first, first + layers * step, step)
    split = (range(resident), range(resident, resident + pinned), range(resident + pinned, resident + pinned + disk))
    on_device, in_memory, in_file = ({layer: list(part) for layer in ids} for part in split)
    return Tiering(on_device, in_memory, in_file, spare)


def fill(store: ExpertStore) -> ExpertStore:
    """Put every record and seal."""
    for layer in store.tiering.layers:
        for expert in range(store.tiering.experts):
            store.put(layer, expert).copy_(content((layer, expert), store.record_nbytes, store.device))
            store.done(layer, expert)
    store.seal()
    return store


def make(where: Tiering, folder: Path | None = None, lane: Lane | None = None, nbytes: int = RECORD) -> ExpertStore:
    """A filled store on the CPU."""
    return fill(ExpertStore(CPU, nbytes, where, folder, lane))


def groups(store: ExpertStore, layer: int, ids: Iterable[int]) -> Iterator[list[int]]:
    """Experts in groups that fit one after the other, each one brought once, while the group before it is in use."""
    store._advance()
    bank, wanted = store._bank, [(layer, expert) for expert in dict.fromkeys(ids)]
    store._count(wanted, bank.count_hits(wanted))
    here = [key for key in wanted if bank.is_here(key)]
    rest = [key for key in wanted if not bank.is_here(key)]
    size = max(1, bank.room // 2)  # the other half is for the group to come
    parts = [here] if here else []
    parts += [rest[first : first + size] for first in range(0, len(rest), size)]
    for group, following in zip(parts, [*parts[1:], []], strict=True):
        bank.take(group)
        try:
            bank.begin(following)
            yield [expert for _, expert in group]
        finally:
            store.used(layer)


def absent(store: ExpertStore, layer: int, ids: Tensor) -> Tensor:
    """Which of `ids` were not there, bool of their shape, for the work around it on the current stream."""
    return store.addresses(layer)[ids.long()] == (store.poison_address or -1)


def check_required(store: ExpertStore, layer: int, ids: Any) -> None:
    """Experts that were required are where the table says, byte for byte."""
    for expert in ids:
        record = store.record(layer, expert)
        assert int(store.addresses(layer)[expert]) == record.data_ptr()
        assert torch.equal(record, content((layer, expert), store.record_nbytes, store.device))


class Point:
    """A mark of the simulated lane."""

    passed = False


Step = tuple[str, Any]  # "do" something, "pass" a mark, "wait" for one


class UnrulyLane(HostLane):
    """Two streams whose work is done late, in any order that the marks allow."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.streams: dict[str, deque[Step]] = {"compute": deque(), "copy": deque()}

    def issue(self, stream: str, work: Callable[[], Any]) -> Point:
        """Let `work` be done some time later; returns its end."""
        point = Point()
        self.streams[stream] += [("do", work), ("pass", point)]
        return point

    def run(self, steps: int) -> None:
        """Go on by some steps of streams that need not wait."""
        for _ in range(steps):
            ready = [s for s in self.streams.values() if s and (s[0][0] != "wait" or s[0][1].passed)]
            if not ready:
                assert not any(self.streams.values()), "the streams wait for each other"
                return
            kind, what = self.random.choice(ready).popleft()
            if kind == "do":
                what()
            elif kind == "pass":
                what.passed = True

    def mark(self) -> Mark:
        return self.issue("compute", lambda: None)

    def bring(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        if after is not None:
            self.streams["copy"].append(("wait", after))
        half = len(slot) // 2
        self.issue("copy", lambda: slot[:half].copy_(source[:half]))
        return self.issue("copy", lambda: slot[half:].copy_(source[half:]))

    def save(self, place: Tensor, slot: Tensor) -> Mark:
        self.finish()  # the disk's threads may ask for it, and this machine has one
        place.copy_(slot)
        return None

    def publish(self, table: Tensor, rows: Tensor, changed: Mapping[tuple[int, int], int]) -> None:
        values = dict(changed)

        def write() -> None:
            for entry, value in values.items():
                table[entry] = value

        self.issue("compute", write)

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            self.streams["compute"].append(("wait", mark))

    def join(self, mark: Mark) -> None:
        while mark is not None and not mark.passed:
            self.run(1)

    def passed(self, mark: Mark) -> bool:
        return mark is None or bool(mark.passed)

    def finish(self) -> None:
        while any(self.streams.values()):
            self.run(100)
