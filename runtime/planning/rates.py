"""How fast a placed model should decode: bytes over measured rates, and fixed times for what bytes do not explain."""

from collections.abc import Sequence
from dataclasses import dataclass

from minibble.runtime.planning.machine import Division, Gpu, Machine
from minibble.runtime.planning.shares import UNIT, Shares

# Kernels for few tokens read 4-bit weights at this share of what reading alone reaches, and at most at the rate at
# which Hopper's processors decode them; a layer's small kernels and gaps are the rest of its time. Together: 306 MB
# take the measured 133 us on an H100 and 108 on an H200 (docs/performance.md).
READ_SHARE = 0.84
DECODED_BYTES_PER_S = 3.3e12
LAYER_S = 15e-6
HOP_S = 45e-6  # the hidden state from one GPU to the next: 12 KiB, measured between two H200
STEP_S = 0.6e-3  # Python and sampling: on two H200 steps of 80 layers took 10.0 ms, 9.4 by the above
# A layer that asks the host which experts come, and each that does, beside its copy: with all 80 layers asking 2.4 and
# 4.8 ms for 2.3 missed (one host was half as fast as the other), 3.9 and 6.9 for 10, 5.0 for 66.
PAUSE_S, MISS_S = 35e-6, 60e-6
# Of an expert that the CPU computes in part, beside the reading of the rest: 30 us on one host, where 52 a step saved
# 26.2 ms; more, since hosts differ.
DIVIDED_S = 100e-6
IN_PLACE_SHARE = 0.915  # of the rate of copies, at which kernels read experts in host memory: 50.3 GB/s of 54.9


def gpu_seconds(nbytes: float, layers: int, gpu: Gpu) -> float:
    """Time in which `gpu` takes a step through `layers` that reads `nbytes`."""
    return nbytes / min(READ_SHARE * gpu.read_bytes_per_s, DECODED_BYTES_PER_S) + layers * LAYER_S


@dataclass(frozen=True)
class Missed:
    """How many of a step's experts are expected to be off the GPUs: read in host memory `in_place`, or copied from
    there or from disk in `pauses` layers."""

    in_place: float
    copied: float
    on_disk: float
    pauses: int

    def seconds(self, record_bytes: int, machine: Machine) -> float:
        """What they take. A layer's copies wait for its router, and it for them."""
        copies, disk = machine.copy_bytes_per_s, min(machine.disk_bytes_per_s, machine.copy_bytes_per_s)
        moved = self.in_place / (IN_PLACE_SHARE * copies) + self.copied / copies + self.on_disk / disk
        return record_bytes * moved + MISS_S * (self.copied + self.on_disk) + PAUSE_S * self.pauses


def saved_seconds(divided: float, division: Division, record_bytes: int, machine: Machine) -> float:
    """What a step gains if of so many of the experts that it reads in place the CPU computes a part."""
    return divided * (division.share * record_bytes / (IN_PLACE_SHARE * machine.copy_bytes_per_s) - DIVIDED_S)


def chances(shares: Shares, experts_per_token: int, batch: int) -> list[list[float]]:
    """For each expert [layers][experts] the probability that a step of `batch` sequences needs it."""
    if shares.even:
        row = [_chance(shares.layers[0][0], experts_per_token, batch)] * len(shares.layers[0])
        return [row] * len(shares.layers)
    return [[_chance(share, experts_per_token, batch) for share in row] for row in shares.layers]


def _chance(share: int, experts_per_token: int, batch: int) -> float:
    return 1 - (1 - min(1.0, experts_per_token * share / UNIT)) ** batch


def summed(chances: Sequence[Sequence[float]], experts: Sequence[Sequence[int]]) -> float:
    """How many different ones of `experts` (ids for each layer) a step is expected to need."""
    return sum(row[expert] for row, ids in zip(chances, experts, strict=True) for expert in ids)
