"""The two orders of work a store keeps apart, what computes with experts and what brings them: all of CUDA it needs.

A mark is a point in one of these orders. All computing must be in one order: on one stream, or on streams that wait for
each other. On the CPU everything has happened when a call returns, and marks mean nothing.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from minibble.runtime.kernels.device import reads_host

log = logging.getLogger(__name__)

Mark = Any  # a torch.cuda.Event, or None for what has long happened

_RING = 64  # tables on their way; only a host so many requests ahead of the device must wait for it
# Changes of a table that are written by a launch each: a copy would wait for experts that the same engine brings.
_ENTRIES = 8
_TIMED = 256  # waits whose times are not read yet


class Lane(Protocol):
    """Copies between host and device, in order."""

    def begin(self, records: Tensor) -> None:
        """Take note of the device memory that `bring` will write to, once, before anything else."""

    def mark(self) -> Mark:
        """The computing issued so far."""

    def bring(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy a record to the device once `after` has passed, beside the computing."""

    def save(self, place: Tensor, slot: Tensor) -> Mark:
        """Copy a record from the device, among the computing."""

    def publish(self, table: Tensor, rows: Tensor, changed: Mapping[tuple[int, int], int]) -> None:
        """Give the device's `table` the values of `rows` as they are now, among the computing; it lacks those of
        `changed` only."""

    def wait(self, mark: Mark) -> None:
        """Let the computing issued from now on wait for `mark`."""

    def join(self, mark: Mark) -> None:
        """Let the host wait for `mark`; any thread may."""

    def passed(self, mark: Mark) -> bool: ...

    def pin(self, memory: Tensor) -> str | None:
        """Let the device copy from host memory by itself; a text says why it refuses."""

    def unpin(self, memory: Tensor) -> None: ...

    def reached(self, memory: Tensor) -> int | None:
        """The address at which the device's kernels read pinned host memory; None if they cannot."""

    def finish(self) -> None:
        """Let the host wait for everything."""

    def stall_s(self) -> float:
        """Seconds that computing has waited for marks, as far as they are known yet."""


def lane_for(device: torch.device) -> Lane:
    """The one for a device."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class HostLane:
    """On the CPU."""

    def begin(self, records: Tensor) -> None: ...

    def mark(self) -> Mark:
        return None

    def bring(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        slot.copy_(source)

    def save(self, place: Tensor, slot: Tensor) -> Mark:
        place.copy_(slot)

    def publish(self, table: Tensor, rows: Tensor, changed: Mapping[tuple[int, int], int]) -> None:
        table.copy_(rows)

    def wait(self, mark: Mark) -> None: ...

    def join(self, mark: Mark) -> None: ...

    def passed(self, mark: Mark) -> bool:
        return True

    def pin(self, memory: Tensor) -> str | None:
        return None

    def unpin(self, memory: Tensor) -> None: ...

    def reached(self, memory: Tensor) -> int | None:
        return None

    def finish(self) -> None: ...

    def stall_s(self) -> float:
        return 0.0


class CudaLane:
    """Computing is torch's current stream; bringing is a stream of the store's own, at the link's rate (55 GB/s)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ring: list[tuple[Tensor, Mark]] = []
        self._timed: list[tuple[Mark, Mark]] = []
        self._stall_s = 0.0

    def begin(self, records: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        records.record_stream(self.stream)  # freed while copies to it are under way, it is not reused before they end

    def mark(self) -> Mark:
        return _recorded(torch.cuda.current_stream(self.device))

    def bring(self, slot: Tensor, source: Tensor, after: Mark) -> Mark:
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            slot.copy_(source, non_blocking=True)
        return _recorded(self.stream)

    def save(self, place: Tensor, slot: Tensor) -> Mark:
        place.copy_(slot, non_blocking=True)
        return self.mark()

    def publish(self, table: Tensor, rows: Tensor, changed: Mapping[tuple[int, int], int]) -> None:
        if len(changed) <= _ENTRIES:
            for entry, value in changed.items():
                table[entry].fill_(value)
            return
        if len(self._ring) < _RING:
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
                place = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        else:
            place, mark = self._ring.pop(0)
            self.join(mark)
        place.copy_(rows)
        table.copy_(place, non_blocking=True)
        self._ring.append((place, self.mark()))

    def wait(self, mark: Mark) -> None:
        if self.passed(mark):
            return
        stream = torch.cuda.current_stream(self.device)
        begin = _recorded(stream, timed=True)
        stream.wait_event(mark)
        self._timed.append((begin, _recorded(stream, timed=True)))
        if len(self._timed) > _TIMED:
            self.stall_s()

    def join(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def passed(self, mark: Mark) -> bool:
        return mark is None or bool(mark.query())

    def pin(self, memory: Tensor) -> str | None:
        with torch.cuda.device(self.device):
            code = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            if code == 0:
                return None
            try:  # a refusal stays behind as the last error, and the next launch would be blamed for it
                torch.zeros(1, device=self.device)
            except RuntimeError as error:
                log.debug("after cudaHostRegister: %s", error)
        return f"cudaHostRegister: error {code}"

    def unpin(self, memory: Tensor) -> None:
        with torch.cuda.device(self.device):
            code = int(_runtime().cudaHostUnregister(memory.data_ptr()))
        if code:
            log.warning("%d bytes of host memory stay pinned: cudaHostUnregister gave error %d", memory.nbytes, code)

    def reached(self, memory: Tensor) -> int | None:
        return memory.data_ptr() if reads_host(self.device) else None

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def stall_s(self) -> float:
        while self._timed and self._timed[0][1].query():
            begin, end = self._timed.pop(0)
            self._stall_s += begin.elapsed_time(end) / 1e3
        return self._stall_s


def _recorded(stream: torch.cuda.Stream, timed: bool = False) -> Mark:
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
