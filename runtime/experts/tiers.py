"""Where the records of experts wait that are not resident: in host memory or on disk, and the buffers between."""

import warnings
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from minibble.quantize import sizes
from minibble.quantize.errors import BudgetError, ConfigError
from minibble.runtime.experts.disk import PAGE, DiskRecords
from minibble.runtime.experts.host import HostRecords, available_nbytes
from minibble.runtime.experts.lanes import Lane, Mark
from minibble.runtime.experts.tiering import Key, Tiering, keys

BUFFERS = 4  # records between disk and device at a time


@dataclass(eq=False)
class Transfer:
    """A record between the disk and a slot, in a buffer that is its own until it is over."""

    key: Key
    data: Tensor
    wanted: bool = True  # by a slot: False for writes, and when the slot has been given away
    reading: bool = True
    work: "list[Future[None]]" = field(default_factory=list)
    copied: bool = False  # the copy to the slot, which ends at `mark`, has been issued
    mark: Mark = None

    def done(self) -> bool:
        """Whether the disk is done with it."""
        return all(one.done() for one in self.work)

    def result(self) -> None:
        """Wait for the disk; CheckpointError if it failed."""
        wait(self.work)
        for one in self.work:
            one.result()


class Tiers:
    """The source of every record that is not resident.

    Host memory that cannot be pinned is made up for by the disk, else by ordinary memory, with a warning. BudgetError
    where host memory is too short for that.
    """

    def __init__(self, lane: Lane, record_nbytes: int, placement: Tiering, folder: Path | None):
        self.lane, self.record_nbytes = lane, record_nbytes
        self.host: dict[Key, Tensor] = {}
        self.pinned: frozenset[Key] = frozenset()  # those in host memory that is
        self.disk: DiskRecords | None = None
        self._memory: list[HostRecords] = []
        self._buffers: list[Tensor] = []
        self._busy: list[Transfer] = []
        if any(placement.disk.values()) and folder is None:
            raise ConfigError("some experts are to wait on disk: name a folder for them")
        with ExitStack() as stack:
            self._closing = stack
            self._place(placement, folder)
            self._closing = stack.pop_all()

    @property
    def host_nbytes(self) -> int:
        """Host memory taken, the buffers among it."""
        return sum(memory.nbytes for memory in self._memory)

    def read(self, key: Key) -> Transfer | None:
        """Begin to read a record from disk; None while all buffers are taken."""
        assert self.disk is not None
        data = self._free_buffer()
        if data is None:
            return None
        transfer = Transfer(key, data)
        self._busy.append(transfer)
        self.disk.read(key, data, transfer.work)
        return transfer

    def arrived(self) -> list[Transfer]:
        """Reads that the disk is done with and that wait to be copied."""
        return [one for one in self._busy if one.wanted and not one.copied and one.done()]

    def may_read(self) -> bool:
        return self._free_buffer() is not None

    def await_buffer(self) -> None:
        """Wait until the oldest transfer under way has come a step further."""
        oldest = self._busy[0]
        wait(oldest.work)
        self.lane.join(oldest.mark)

    def save(self, key: Key, slot: Tensor) -> Mark:
        """Copy a record to where it will wait; returns when the slot may be written to again."""
        if key in self.host:
            return self.lane.save(self.host[key], slot)
        assert self.disk is not None
        while (data := self._free_buffer()) is None:
            self.await_buffer()
        mark = self.lane.save(data[: self.record_nbytes], slot)
        transfer = Transfer(key, data, wanted=False, reading=False)
        self._busy.append(transfer)
        self.disk.write(key, data, lambda: self.lane.join(mark), transfer.work)
        return mark

    def seal(self) -> None:
        """Wait until all that was saved is where it waits."""
        self.lane.finish()
        for transfer in self._busy:
            transfer.result()
        self._busy.clear()
        if self.disk is not None:
            self.disk.seal()

    def close(self) -> None:
        """Give back memory and disk."""
        for transfer in self._busy:
            wait(transfer.work)
        self.lane.finish()
        self.host.clear()
        self._busy.clear()
        self._buffers.clear()
        self._closing.close()

    def _free_buffer(self) -> Tensor | None:
        """A buffer of no transfer; CheckpointError if a write has failed meanwhile."""
        for one in [one for one in self._busy if one.done()]:
            if not one.reading:
                one.result()
            if not one.wanted or (one.copied and self.lane.passed(one.mark)):
                self._busy.remove(one)
        taken = {one.data.data_ptr() for one in self._busy}
        return next((data for data in self._buffers if data.data_ptr() not in taken), None)

    def _place(self, placement: Tiering, folder: Path | None) -> None:
        waiting, on_disk = list(keys(placement.pinned)), list(keys(placement.disk))
        if on_disk:
            self._buffers = self._make_buffers()
        pool = self._take(self.record_nbytes, len(waiting))
        self.host = dict(zip(waiting, pool.records, strict=False))
        self.pinned = frozenset(self.host)
        rest = waiting[len(self.host) :]
        if rest and folder is None:
            self._take_unpinned(rest, pool.short)
        if folder is not None and (rest or on_disk):
            self._buffers = self._buffers or self._make_buffers()
            self.disk = DiskRecords(folder, self.record_nbytes, rest + on_disk)
            self._closing.callback(self.disk.close)
        if rest:
            place = "ordinary memory, from where they come several times slower" if self.disk is None else "disk"
            warnings.warn(
                f"{sizes.decimal(pool.nbytes)} of host memory are pinned, "
                f"{sizes.decimal(len(waiting) * self.record_nbytes)} were to be ({pool.short}): "
                f"{len(rest)} experts wait in {place}",
                stacklevel=4,
            )

    def _take_unpinned(self, rest: list[Key], reason: str | None) -> None:
        needed, free = len(rest) * self.record_nbytes, available_nbytes()
        if needed > free:
            raise BudgetError(
                f"{len(rest)} experts have nowhere to wait: they need {sizes.decimal(needed)} of host memory, "
                f"{sizes.decimal(free)} are free ({reason}); name a folder on disk, or keep more of them on the device"
            )
        self.host |= zip(rest, self._take(self.record_nbytes, len(rest), pinned=False).records, strict=True)

    def _make_buffers(self) -> list[Tensor]:
        nbytes = -(-self.record_nbytes // PAGE) * PAGE
        made = self._take(nbytes, BUFFERS).records
        return [*made, *self._take(nbytes, BUFFERS - len(made), pinned=False).records]

    def _take(self, nbytes: int, count: int, pinned: bool = True) -> HostRecords:
        taken = HostRecords(self.lane, nbytes, count, pinned)
        self._memory.append(taken)
        self._closing.callback(taken.close)
        return taken
