"""Experts that the CPU computes itself, while others are copied to the GPU."""

import time
from collections.abc import Collection, Sequence
from itertools import cycle, islice
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.devices import best_dtype
from minibble.runtime.experts.tiering import Key
from minibble.runtime.kernels.linear4 import Packed, linear, prepare

CPU = torch.device("cpu")
TIMED = 3  # experts that are timed
WARM, ROUNDS = 8, 8  # runs before, in which threads start and clocks rise, from 20 ms to 2; and of those that count
IDLE_S = 0.01  # between them, as in decoding: threads that have gone to sleep make an expert take half as long again
LEAST_GAIN = 0.1  # of the time without the CPU, for which it is asked: both read the same memory


class Processor:
    """The experts `keys` in the form of the CPU's own kernels, beside their records.

    Activations have `dtype`, by default the best for this CPU.
    """

    def __init__(self, keys: Collection[Key], dtype: torch.dtype | None = None):
        self.keys, self.dtype = frozenset(keys), dtype or best_dtype(CPU)
        self._gate_up: dict[Key, Packed] = {}
        self._down: dict[Key, Packed] = {}

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for held in (self._gate_up, self._down) for packed in held.values())

    def put(self, key: Key, kind: Literal["gate_up", "down"], parts: Sequence[QuantizedTensor]) -> None:
        """Lay out gate and up, [F, D] each, or down, [D, F], if the expert is one of `keys`; on any device."""
        if key in self.keys:
            held = self._gate_up if kind == "gate_up" else self._down
            held[key] = prepare([part.to(CPU) for part in parts], CPU, self.dtype)

    def __call__(self, key: Key, x_MD: Tensor) -> Tensor:
        """down(silu(gate x) * up x), float32 [M, D], of x [M, D] on the CPU."""
        gate, up = linear(x_MD.to(self.dtype), self._gate_up[key]).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self._down[key], torch.float32)

    def seconds(self) -> float:
        """How long an expert takes for one token, measured now; infinity without any."""
        keys, times = list(self._down)[:TIMED], []
        for key in islice(cycle(keys), WARM + ROUNDS):
            x = torch.ones(1, self._gate_up[key].shape[1])
            time.sleep(IDLE_S)
            began = time.perf_counter()
            self(key, x)
            times.append(time.perf_counter() - began)
        return median(times[WARM:]) if keys else float("inf")


def shared_out(missing: int, copy_s: float, compute_s: float) -> int:
    """How many of the missing experts to compute, so that both are done soonest; of equals as few as possible, and none
    where that gains little."""

    def takes(computed: int) -> float:
        copied = missing - computed
        return max(computed * compute_s if computed else 0.0, copied * copy_s if copied else 0.0)

    best = min(range(missing + 1), key=lambda computed: (takes(computed), computed))
    return best if takes(best) < (1 - LEAST_GAIN) * takes(0) else 0
