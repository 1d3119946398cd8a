"""How fast a placed model should decode: bytes over measured rates, and fixed times for what bytes do not explain."""

from collections.abc import Sequence

from minibble.runtime.planning.machine import Gpu, Machine
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
DIVIDED_S = 100e-6  # of an expert that the CPU computes in part, beside the copy of the rest


def gpu_seconds(nbytes: float, layers: int, gpu: Gpu) -> float:
    """Time in which `gpu` takes a step through `layers` that reads `nbytes`."""
    return nbytes / min(READ_SHARE * gpu.read_bytes_per_s, DECODED_BYTES_PER_S) + layers * LAYER_S


def missed_seconds(
    pinned: float, on_disk: float, divided: float, pauses: int, record_bytes: int, machine: Machine
) -> float:
    """Time for so many of a step's experts that are in host memory and on disk, in `pauses` layers; of the first
    `divided` are the CPU's in part. A layer's copies wait for its router, and it for them."""
    rate = min(machine.disk_bytes_per_s, machine.copy_bytes_per_s)
    share = 0.0 if machine.division is None else machine.division.share
    copied_s = record_bytes * ((pinned - share * divided) / machine.copy_bytes_per_s + on_disk / rate)
    return copied_s + MISS_S * (pinned + on_disk) + DIVIDED_S * divided + PAUSE_S * pauses


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
