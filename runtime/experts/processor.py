"""Experts whose last hidden units the CPU computes itself, while the GPU computes the others."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from minibble.quantize.nf4_math import decode_absmax
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.devices import best_dtype
from minibble.runtime.experts.tiering import Key
from minibble.runtime.kernels.linear4 import Packed, linear, prepare

CPU = torch.device("cpu")


class Processor:
    """The last hidden `units` of the experts `keys` in the form of the CPU's own kernels, beside their records.

    Activations have `dtype`, by default the best for this CPU.
    """

    def __init__(self, keys: Collection[Key], units: int, dtype: torch.dtype | None = None):
        self.keys, self.units, self.dtype = frozenset(keys), units, dtype or best_dtype(CPU)
        self._gate_up: dict[Key, Packed] = {}
        self._down: dict[Key, Packed] = {}

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for held in (self._gate_up, self._down) for packed in held.values())

    @property
    def columns(self) -> int:
        """The hidden size of the experts that have been put."""
        return next(iter(self._gate_up.values())).shape[1]

    def put(self, key: Key, kind: Literal["gate_up", "down"], parts: Sequence[QuantizedTensor]) -> None:
        """Lay out gate and up, [F, D] each, or down, [D, F], if the expert is one of `keys`; on any device."""
        if key in self.keys:
            (N, K), last = parts[0].shape, self.units
            held, row, column = (self._gate_up, N - last, 0) if kind == "gate_up" else (self._down, 0, K - last)
            held[key] = prepare([_last(part, row, column) for part in parts], CPU, self.dtype)

    def repeat(self, key: Key) -> None:
        """Give all others of `keys` the weights of `key`, each in memory of its own."""
        for held in (self._gate_up, self._down):
            held |= {other: deepcopy(held[key]) for other in self.keys - {key}}

    def __call__(self, key: Key, x_MD: Tensor) -> Tensor:
        """Their part of down(silu(gate x) * up x), float32 [M, D], of x [M, D] on the CPU."""
        gate, up = linear(x_MD.to(self.dtype), self._gate_up[key]).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self._down[key], torch.float32)


def _last(q: QuantizedTensor, row: int, column: int) -> QuantizedTensor:
    """Rows from `row` on and columns from `column` on, which must be whole blocks; second-level scales are resolved."""
    N, K = q.shape
    absmax = q.absmax if q.levels == "int4" else decode_absmax(q)
    return replace(
        q,
        shape=(N - row, K - column),
        codes=q.codes.view(N, -1)[row:, column // 2 :].flatten(),
        absmax=absmax.view(N, -1)[row:, column // q.block_size :].flatten(),
        nested_absmax=None,
        nested_offset=None,
    )
