"""The slots on a device, what fills them, and the table through which kernels see them.

A record never changes, so eviction only forgets where it was. Three rules keep what kernels read whole. A slot that
work still to be issued needs is held. A slot is overwritten, on a stream of its own, after the last work that was
issued on it. The table's entries change in the order of the computing, and an expert that is not ready has the address
of a record full of NaN.
"""

import time
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from minibble.quantize.errors import BudgetError, CheckpointError
from minibble.runtime.experts.lanes import Lane, Mark
from minibble.runtime.experts.slots import Slots
from minibble.runtime.experts.stats import ExpertStats
from minibble.runtime.experts.tiering import Key, Tiering, keys
from minibble.runtime.experts.tiers import Tiers, Transfer

_POISON = 0xFF  # a scale made of it is NaN in every floating-point format


@dataclass
class _Slot:
    read: Mark = None  # after it nothing issued so far reads or writes the slot
    ready: Mark = None  # the copy to it, as long as the computing has not been made to wait for it
    incoming: Transfer | None = None  # from the disk, not yet copied
    predicted: bool = False  # brought by a prefetch and not asked for yet


class Bank:
    """One buffer on `device`: the resident experts, the spare slots, and the poison that all others point to."""

    def __init__(self, device: torch.device, lane: Lane, tiers: Tiers, placement: Tiering, stats: ExpertStats):
        self.lane, self.tiers, self.stats = lane, tiers, stats
        self.rows = {layer: row for row, layer in enumerate(placement.layers)}
        self.resident = {key: place for place, key in enumerate(keys(placement.resident))}
        self.slots = Slots(placement.spare)
        self._of = [_Slot() for _ in range(placement.spare)]
        self._told: dict[Key, int] = {}  # addresses in the table but for residents' and the poison's
        self.records = torch.empty(placement.records, tiers.record_nbytes, dtype=torch.uint8, device=device)
        lane.begin(self.records)
        first, step = self.records.data_ptr() + len(self.resident) * self.records.stride(0), self.records.stride(0)
        self._addresses = range(first, first + placement.spare * step, step)
        self.poison = self.records[-1].fill_(_POISON).data_ptr() if placement.offloaded else 0
        self._entries = torch.full((len(self.rows), placement.experts), self.poison, dtype=torch.int64)
        for (layer, expert), place in self.resident.items():
            self._entries[self.rows[layer], expert] = self.records[place].data_ptr()
        self._numbers = self._entries.numpy()  # the same memory, which torch takes 8 us to write a number to
        self.table = self._entries.to(device, copy=True)
        self._changed: dict[tuple[int, int], int] = {}  # entries that the device does not have yet, and their values

    @property
    def room(self) -> int:
        """Slots that are not held."""
        return len(self.slots) - len(self.slots.held)

    def is_here(self, key: Key) -> bool:
        """Whether an expert is in a slot or on its way to one."""
        return key in self.resident or self.slots.find(key) is not None

    def view(self, key: Key) -> Tensor:
        """The slot of an expert that is here."""
        place = self.resident.get(key)
        if place is None:
            slot = self.slots.find(key)
            assert slot is not None
            return self._spare(slot)
        return self.records[place]

    def count_hits(self, wanted: list[Key]) -> int:
        """How many are here; of these, the predicted ones are counted as such, once."""
        for key in wanted:
            slot = self.slots.find(key)
            if slot is not None and self._of[slot].predicted:
                self._of[slot].predicted = False
                self.stats.predicted_right += 1
        return sum(self.is_here(key) for key in wanted)

    def save(self, key: Key) -> None:
        """Copy an expert that was written to its held slot to where it waits; it stays, but need not."""
        slot = self.slots.find(key)
        assert slot is not None and slot in self.slots.held, f"expert {key[1]} of layer {key[0]} was not put"
        self._of[slot].read = self.tiers.save(key, self._spare(slot))
        self.slots.held.discard(slot)
        self._set(key, slot)

    def take(self, wanted: list[Key]) -> None:
        """Bring, hold and make ready; either all or, after an error, none are held."""
        coming = [key for key in wanted if key not in self.resident]
        before = set(self.slots.held)
        self.slots.held |= {slot for key in coming if (slot := self.slots.find(key)) is not None}
        try:
            missing = sum(self.slots.find(key) is None for key in coming)
            if missing > self.room:
                raise BudgetError(
                    f"{missing} experts of layer {wanted[0][0]} must come, {self.room} of {len(self.slots)} slots are "
                    "free for them; plan more slots"
                )
            for key in coming:
                self._bring(key)
            slots = [self._settled(key) for key in coming]
            for key, slot in zip(coming, slots, strict=True):
                self._set(key, slot)
            self.publish()  # while they are on their way
            for slot in slots:
                self.lane.wait(self._of[slot].ready)
                self._of[slot].ready = None
        except BaseException:
            self.slots.held &= before
            self.publish()
            raise

    def begin(self, wanted: list[Key], predicted: bool = False) -> None:
        """Begin to bring what is not here, as far as there are slots and buffers."""
        keep: set[int] = set()
        try:
            for key in (key for key in wanted if key not in self.resident):
                slot = self.slots.find(key)
                if slot is not None:
                    self.slots.touch(slot)
                elif self.slots.victim(keep) is None:
                    break
                else:
                    slot = self._start(key, keep)
                    if slot is None:
                        continue
                    self._of[slot].predicted = predicted
                    self.stats.prefetched += predicted
                keep.add(slot)
        finally:
            self.publish()

    def release(self, layer: int) -> None:
        """Hold no longer what is held of a layer; what has been issued may go on reading it."""
        slots = self.slots.held_of(layer)
        if slots:
            mark = self.lane.mark()
            for slot in slots:
                self._of[slot].read = mark
                self.slots.held.discard(slot)

    def held_layers(self) -> set[int]:
        """The layers of which something is held."""
        return {key[0] for slot in self.slots.held if (key := self.slots.keys[slot]) is not None}

    def vacate(self, keep: Set[int] = frozenset()) -> int:
        """A free slot, for which the least recently used expert may have to go."""
        slot = self.slots.victim(keep)
        if slot is None:
            raise BudgetError(
                f"all {len(self.slots)} slots are in use: give them up with `used` or `done`, or give the store more"
            )
        if self.slots.keys[slot] is not None:
            self._forget(slot)
        return slot

    def advance(self) -> None:
        """Pass on what the disk has delivered. What it failed to deliver is forgotten, and tried again if required."""
        for transfer in self.tiers.arrived():
            slot = self.slots.find(transfer.key)
            if slot is None or self._of[slot].incoming is not transfer:
                transfer.wanted = False  # its expert was forgotten meanwhile
            else:
                self._arrive(slot, transfer)

    def publish(self) -> None:
        """Give the device the table as it is now, if it has changed."""
        if self._changed:
            self.lane.publish(self.table, self._entries, self._changed)
            self._changed = {}

    def close(self) -> None:
        """Let go of the memory."""
        self.slots, self._of = Slots(0), []
        self.records, self.table = self.records[:0].clone(), self.table[:0].clone()

    def _spare(self, slot: int) -> Tensor:
        return self.records[len(self.resident) + slot]

    def _bring(self, key: Key) -> int:
        """The slot of `key`, now held, to which it has come or is on its way."""
        slot = self.slots.find(key)
        while slot is None and (slot := self._start(key)) is None:
            began = time.perf_counter()
            self.tiers.await_buffer()
            self.stats.stall_s += time.perf_counter() - began
            self.advance()
        self.slots.held.add(slot)
        self.slots.touch(slot)
        return slot

    def _settled(self, key: Key) -> int:
        """The slot to which a copy of `key` has been issued; the host waits if it comes from the disk."""
        slot = self._bring(key)  # again, if its read failed while another one was waited for
        transfer = self._of[slot].incoming
        if transfer is not None:
            began = time.perf_counter()
            try:
                transfer.result()
            finally:
                self.stats.stall_s += time.perf_counter() - began
                if transfer.done():
                    self._arrive(slot, transfer)
        return slot

    def _start(self, key: Key, keep: Set[int] = frozenset()) -> int | None:
        """Begin to bring `key` to a slot; None if it is on disk and all buffers are taken."""
        source = self.tiers.host.get(key)
        if source is None and not self.tiers.may_read():
            return None
        before = len(self.slots.present)
        slot = self.vacate(keep)
        self.stats.evictions += before - len(self.slots.present)
        own = self._of[slot]
        # The slot becomes that of `key` last: an interruption before leaves a free slot, and nothing to undo.
        if source is None:
            own.incoming, own.ready = self.tiers.read(key), None
        else:
            own.incoming, own.ready = None, self.lane.bring(self._spare(slot), source, own.read)
            self.stats.bytes_from_host += source.nbytes
        own.predicted = False
        self.slots.give(slot, key)
        return slot

    def _forget(self, slot: int) -> None:
        own, key = self._of[slot], self.slots.keys[slot]
        assert key is not None
        if self._told.get(key) == self._addresses[slot]:
            self._set(key, None)
        own.incoming = own.ready = None
        self.slots.drop(slot)

    def _arrive(self, slot: int, transfer: Transfer) -> None:
        """Copy what the disk has delivered to its slot, or forget it."""
        own = self._of[slot]
        try:
            transfer.result()
        except CheckpointError:
            self.stats.failed_reads += 1
            self._forget(slot)
            return
        source = transfer.data[: self.tiers.record_nbytes]
        transfer.mark = self.lane.bring(self._spare(slot), source, own.read)
        own.ready, own.incoming, transfer.copied = transfer.mark, None, True
        self.stats.bytes_from_disk += source.nbytes

    def _set(self, key: Key, slot: int | None) -> None:
        """Let the table's next version say where `key` is."""
        address = self.poison if slot is None else self._addresses[slot]
        if self._told.get(key, self.poison) != address:
            self._told[key] = address
            entry = (self.rows[key[0]], key[1])
            self._numbers[entry] = self._changed[entry] = address
