"""What a machine offers to a model: GPUs, host memory and disk, and how fast experts come from each."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minibble.quantize.errors import ConfigError
from minibble.quantize.sizes import parse_size

# Measured, reading alone: an H100 with 80 GB and an H200 with 141 GB, the lower of its two runs.
READ_BYTES_PER_S = 3.09e12
READ_BYTES_PER_S_LARGE = 4.35e12
LARGE_BYTES = 120 * 10**9  # between the two; where a size is all that is known it stands for the card
COPY_BYTES_PER_S = 55e9  # pinned host memory to GPU, copies of 85 MiB and more: 53 to 55 GB/s on both
DISK_BYTES_PER_S = 1.7e9  # direct reads, the slower of two machines

_GPUS = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(.+)")
MAX_GPUS = 64  # more than a host has: what is meant is another thing


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch calls `device`, of which a model may take `memory_bytes`, the CUDA context included."""

    device: str
    memory_bytes: int
    read_bytes_per_s: float = READ_BYTES_PER_S

    @classmethod
    def of_size(cls, index: int, memory_bytes: int) -> "Gpu":
        """The CUDA device number `index`, its speed taken from its size."""
        fast = memory_bytes >= LARGE_BYTES
        return cls(f"cuda:{index}", memory_bytes, READ_BYTES_PER_S_LARGE if fast else READ_BYTES_PER_S)


@dataclass(frozen=True)
class Division:
    """The CPU computes the last `units` of a missing expert's `whole` hidden units, from `nbytes` of host memory beside
    its record, while the GPU reads the others. They can be fewer by multiples of `step`."""

    units: int
    whole: int
    step: int
    nbytes: int

    @property
    def share(self) -> float:
        """Of an expert, the CPU's part."""
        return self.units / self.whole

    @property
    def smaller(self) -> Iterator["Division"]:
        """This one, and those with less for the CPU."""
        for units in range(self.units, 0, -self.step):
            yield replace(self, units=units, nbytes=self.nbytes * units // self.units)


@dataclass(frozen=True)
class Machine:
    """What is there for a model. `gpus` are used from the first on, in this order.

    `host_bytes` is the most to pin in host memory, None for whatever is needed; `disk_bytes` the most that experts
    read from disk again and again may take there, None if none may. With a `division` the CPU helps, at most so much.
    """

    gpus: tuple[Gpu, ...]
    host_bytes: int | None = None
    disk_bytes: int | None = None
    copy_bytes_per_s: float = COPY_BYTES_PER_S
    disk_bytes_per_s: float = DISK_BYTES_PER_S
    division: Division | None = None

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], host_bytes: int | None = None, disk_bytes: int | None = None) -> "Machine":
        """GPUs of `sizes` bytes at the speeds measured on such, numbered from 0."""
        gpus = tuple(Gpu.of_size(index, size) for index, size in enumerate(sizes))
        return cls(gpus, host_bytes=host_bytes, disk_bytes=disk_bytes)


def gpu_sizes(text: str) -> tuple[int, ...]:
    """Bytes of each GPU meant by `2x141GB` or `80GB,141GB`; ConfigError if that is no list of sizes."""
    sizes: list[int] = []
    for part in text.split(","):
        match = _GPUS.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"'{text}' is no list of GPUs: write 141GB, 2x141GB or 80GB,141GB")
        size, number = parse_size(match[2]), int(match[1] or 1)
        if size <= 0 or not 1 <= number <= MAX_GPUS - len(sizes):
            raise ConfigError(f"'{text}' is no list of 1 to {MAX_GPUS} GPUs, each with some memory")
        sizes += [size] * number
    return tuple(sizes)
