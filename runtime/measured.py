"""What the machine that this runs on offers to a model: bytes that are free, and rates where hosts differ."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minibble.runtime.devices import this_machine
from minibble.runtime.experts import division
from minibble.runtime.experts.disk import PAGE, DiskRecords
from minibble.runtime.experts.host import HostRecords
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.experts.tiers import Transfer
from minibble.runtime.plan import Source
from minibble.runtime.planning.device_bytes import model_bytes
from minibble.runtime.planning.machine import Machine

_READS = 8  # experts, one after the other, as a step asks for them


def measured_machine(
    source: Source,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    host_memory: int | None,
    folder: Path | None,
    cpu_experts: bool,
) -> Machine:
    """The machine for experts of `source`, the rate of the disk of `folder` among it, and with `cpu_experts` what the
    CPU can compute of them.

    CheckpointError where the folder cannot be used.
    """
    machine = this_machine(devices, host_memory, folder)
    if folder is not None and machine.disk_bytes:
        machine = replace(machine, disk_bytes_per_s=disk_rate(folder, model_bytes(source, dtype).record_bytes))
    return division.helped(machine, source, dtype, devices[0]) if cpu_experts else machine


def disk_rate(folder: Path, record_nbytes: int) -> float:
    """Bytes a second at which records of that size come from a file in `folder`, which is gone afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the disk refuses: the file of the experts will say so, too
        records = DiskRecords(folder, record_nbytes, [(0, expert) for expert in range(_READS)])
    memory = HostRecords(HostLane(), -(-record_nbytes // PAGE) * PAGE, 1, pinned=False)
    (buffer,) = memory.records
    try:
        buffer.random_()
        for key in records.index:
            written = Transfer(key, buffer)
            records.write(key, buffer, lambda: None, written.work)
            written.result()
        records.seal()
        began = time.perf_counter()
        for key in records.index:
            read = Transfer(key, buffer)
            records.read(key, buffer, read.work)
            read.result()
        return _READS * record_nbytes / (time.perf_counter() - began)
    finally:
        records.close()
        memory.close()
