"""Experts that kernels read where they wait: in pinned host memory, through the link, while nobody brings them.

A step then has nothing to ask the host, and what a kernel reads it multiplies at once. The link gives kernels nine
tenths of what it gives the copy engine, so this is for steps that miss few experts a layer
(docs/adr/0013-expert-tiers.md).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minibble.runtime.experts.tiering import Key, Tiering

# Experts that a layer misses on average. One takes 1.75 ms with its products, and when copied as much: 1.60, 0.06 for
# products, and 0.1 in which the host learns of it. Each further one takes 0.15 more than a copy.
MOST = 2.0


def worthwhile(choices: int, missing: int, experts: int) -> bool:
    """Whether a step of so many choices is better read in place in a layer that lacks `missing` of its `experts`."""
    return 0 < choices * missing <= MOST * experts


class Readable(NamedTuple):
    """Of a layer, on the device: addresses of its experts, int64 [E], and 1 for those in host memory, uint8 [E].

    `counts`, int64 [2], of experts read from the device and from host memory, are the store's.
    """

    addresses: Tensor
    far: Tensor
    counts: Tensor


class InPlace:
    """The layers of which every expert is on the device for good or in host memory that kernels can read."""

    def __init__(self, device: torch.device, tiering: Tiering, near: Mapping[Key, int], far: Mapping[Key, int]):
        """Addresses on the device and in host memory."""
        known = {**far, **near}
        every = [[(layer, expert) for expert in range(tiering.experts)] for layer in tiering.layers]
        whole = [keys for keys in every if all(key in known for key in keys)]
        self._rows = {keys[0][0]: row for row, keys in enumerate(whole)}
        self._addresses = torch.tensor([[known[key] for key in keys] for keys in whole], device=device)
        self._far = torch.tensor(
            [[key not in near for key in keys] for keys in whole], dtype=torch.uint8, device=device
        )
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def of(self, layer: int) -> Readable | None:
        """None if an expert of the layer cannot be read where it is."""
        row = self._rows.get(layer)
        return None if row is None else Readable(self._addresses[row], self._far[row], self._counts)

    def counted(self) -> tuple[int, int]:
        """Experts read so far from the device and from host memory; the host waits for what has been issued."""
        near, far = self._counts.tolist()
        return near, far
