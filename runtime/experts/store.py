"""The experts of one GPU's layers, those that fit on it and those that come when they are needed."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError
from minibble.runtime.experts.bank import Bank
from minibble.runtime.experts.errands import Errands
from minibble.runtime.experts.in_place import InPlace, Readable
from minibble.runtime.experts.lanes import Lane, lane_for
from minibble.runtime.experts.processor import Processor
from minibble.runtime.experts.stats import ExpertStats
from minibble.runtime.experts.tiering import Key, Tiering
from minibble.runtime.experts.tiers import Tiers

ALIGNMENT = 256  # bytes; what kernels expect of a record


class ExpertStore:
    """Experts of `record_nbytes` each, placed by `tiering`; `folder` is for those that wait on disk.

    Of those of `processor` the CPU computes the last of `units` hidden units where they are read in place.

    Fill it: `put` and `done` for every expert, then `seal`. Then, for each step: `require`, compute, `used`; or, where
    experts are `readable` in place, compute. One thread at a time; all computing on streams that wait for each other,
    none of it being captured meanwhile. BudgetError where slots or host memory do not suffice, CheckpointError where
    the disk fails; the store may be asked again after both.
    """

    def __init__(
        self,
        device: torch.device,
        record_nbytes: int,
        tiering: Tiering,
        folder: Path | None = None,
        lane: Lane | None = None,
        processor: Processor | None = None,
        units: int = 0,
    ):
        assert record_nbytes > 0 and record_nbytes % ALIGNMENT == 0, f"records of {record_nbytes} bytes"
        tiering.check()
        self.device, self.record_nbytes, self.tiering = device, record_nbytes, tiering
        lane = lane_for(device) if lane is None else lane
        self._stats, self._filled = ExpertStats(), set[Key]()
        self._sealed = self._closed = False
        self._in_place: InPlace | None = None
        self.errands: Errands | None = None
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
            self._tiers = Tiers(lane, record_nbytes, tiering, folder)
            try:
                self._bank = Bank(device, lane, self._tiers, tiering, self._stats)
            except BaseException:
                self._tiers.close()
                raise
            if processor is not None:
                self.errands = Errands(device, lane, processor, units, tiering.experts)

    @property
    def lane(self) -> Lane:
        """The order of the computing, and of the copies."""
        return self._bank.lane

    @property
    def device_nbytes(self) -> int:
        """Device memory taken: resident experts, spare slots, one record of poison and the table."""
        return self._bank.records.nbytes + self._bank.table.nbytes

    @property
    def host_nbytes(self) -> int:
        return self._tiers.host_nbytes

    @property
    def disk_nbytes(self) -> int:
        return 0 if self._tiers.disk is None else self._tiers.disk.nbytes

    @property
    def stats(self) -> ExpertStats:
        """What has been done so far, as a copy."""
        self._stats.device_stall_s = self._bank.lane.stall_s()
        if self._tiers.disk is not None:
            self._stats.buffered_reads = self._tiers.disk.buffered
        found = self._stats.snapshot()
        if self._in_place is not None:
            near, far = self._in_place.counted()
            found.hits, found.misses, found.in_place = found.hits + near, found.misses + far, far
            found.bytes_from_host += far * self.record_nbytes
        if self.errands is not None:
            found.computed = self.errands.computed
            found.bytes_from_host -= int(found.computed * self.errands.share * self.record_nbytes)
        return found

    @property
    def poison_address(self) -> int:
        """What the table says of an expert that is not there: a record that gives NaN; 0 if all are resident."""
        return self._bank.poison

    def addresses(self, layer: int) -> Tensor:
        """Where each expert lies, int64 [E] on the device, always in the same place."""
        return self._bank.table[self._bank.rows[layer]]

    def is_here(self, layer: int, expert: int) -> bool:
        """Whether an expert is on the device, or on its way to it."""
        return self._bank.is_here((layer, expert))

    def record(self, layer: int, expert: int) -> Tensor:
        """The record of an expert that is resident, or required and not yet given up by `used`."""
        bank, key = self._bank, (layer, expert)
        if key not in bank.resident:
            slot = bank.slots.find(key)
            assert slot is not None and slot in bank.slots.held, f"expert {expert} of layer {layer} was not required"
        return bank.view(key)

    def put(self, layer: int, expert: int) -> Tensor:
        """Where to write an expert's record, uint8 [record_nbytes] on the device, until `done` is called for it.

        Those that are not resident are written to spare slots, so as many of them can be open at a time.
        """
        key = (layer, expert)
        assert not self._sealed and key not in self._filled, f"expert {expert} of layer {layer} has been filled"
        if not self._bank.is_here(key):
            slot = self._bank.vacate()
            self._bank.slots.give(slot, key)
            self._bank.slots.held.add(slot)
        return self._bank.view(key)

    def done(self, layer: int, expert: int) -> None:
        """Take over the record written to where `put` said; its copy to where it waits is only issued."""
        key = (layer, expert)
        if key not in self._bank.resident:
            self._bank.save(key)
        self._filled.add(key)

    def seal(self) -> None:
        """Wait until every record is where it waits; CheckpointError if some have not been filled."""
        every = {(layer, expert) for layer in self.tiering.layers for expert in range(self.tiering.experts)}
        missing = sorted(every - self._filled)
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(every)} experts were not filled, the first is expert {missing[0][1]} of layer "
                f"{missing[0][0]}; load all layers"
            )
        self._tiers.seal()
        self._bank.publish()
        self._sealed = True
        with torch.inference_mode(False):
            self._in_place = self._found_in_place()

    def readable(self, layer: int) -> Readable | None:
        """Where kernels find every expert of a layer without `require`; None if they do not."""
        return None if self._in_place is None else self._in_place.of(layer)

    def require(self, layer: int, ids: Iterable[int]) -> None:
        """Let the experts `ids` be there for the computing issued from now on, until `used`.

        The host waits for the disk alone. BudgetError if more must come than there are slots.
        """
        self._advance()
        wanted = _distinct(layer, ids)
        hits = self._bank.count_hits(wanted)
        self._bank.take(wanted)
        self._count(wanted, hits)

    def used(self, layer: int) -> None:
        """Give up what was required of a layer: all work that reads it has been issued."""
        self._bank.release(layer)

    def give_up(self) -> None:
        """Let the device end what waits for the CPU's part of experts: nobody is going to compute it."""
        if self.errands is not None:
            self.errands.give_up()

    def used_all(self) -> None:
        """Give up everything that was required."""
        for layer in self._bank.held_layers():
            self.used(layer)

    def prefetch(self, layer: int, ids: Iterable[int]) -> None:
        """Begin to bring experts that will probably be required, as far as there are slots that are not held."""
        self._advance()
        self._bank.begin(_distinct(layer, ids), predicted=True)

    def close(self) -> None:
        """Give back all memory and the file."""
        if not self._closed:
            self._closed = True
            self._in_place = self.errands = None
            self._tiers.close()
            self._bank.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _found_in_place(self) -> InPlace:
        bank, tiers = self._bank, self._tiers
        near = {key: bank.view(key).data_ptr() for key in bank.resident}
        far = {key: address for key in tiers.pinned if (address := bank.lane.reached(tiers.host[key])) is not None}
        return InPlace(self.device, self.tiering, near, far)

    def _advance(self) -> None:
        assert self._sealed and not self._closed, "a store is asked after it is sealed and before it is closed"
        self._bank.advance()

    def _count(self, wanted: list[Key], hits: int) -> None:
        self._stats.hits += hits
        self._stats.misses += len(wanted) - hits


def _distinct(layer: int, ids: Iterable[int]) -> list[Key]:
    return [(layer, expert) for expert in dict.fromkeys(ids)]
