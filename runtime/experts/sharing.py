"""A decode step's missing experts, shared out between copy engine and CPU. Axes: M tokens, A active, D hidden."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minibble.runtime.experts.lanes import Mark
from minibble.runtime.experts.processor import Processor, shared_out
from minibble.runtime.experts.store import ExpertStore

if TYPE_CHECKING:
    from minibble.runtime.experts.table import OffloadedTable


def look(store: ExpertStore, places: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy what a stretch has just made to host memory; its experts, and those of the layers before, have been used."""
    store.used_all()
    store.lane.join(_copy(store, places, given))


def _copy(store: ExpertStore, places: Sequence[Tensor], given: Sequence[Tensor]) -> Mark:
    """Begin to copy, among the computing; returns what to wait for."""
    for place, made in zip(places, given, strict=True):
        place.copy_(made, non_blocking=True)
    return store.lane.mark()


class SharedFetch:
    """As `table.Fetch`, but some of the missing experts are computed here while others come.

    What the GPU is left with is in places of its own: `ids` and `weights`, in which pairs that were computed here have
    the weight 0 of an expert that is there, and `extra`, float32 [1, M, D], what these add. The stretch before fills
    them as if nothing were computed here, so that most layers cost no more than without.
    """

    def __init__(self, table: "OffloadedTable", processor: Processor, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor):
        self.table, self.processor = table, processor
        self.given, self.device = (ids_MA, weights_MA, y_MD), y_MD.device
        extra = torch.zeros(1, *y_MD.shape, device=y_MD.device)
        self._left = (ids_MA.clone(), weights_MA.clone(), extra)
        self._seen: list[Tensor] = []

    def prepare(self) -> None:
        """Make room in host memory."""
        if not self._seen:
            ids, weights, y = self.given
            pinned = y.is_cuda
            self._seen = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned) for x in (ids, weights, y)]
            self._seen.append(torch.empty(1, *y.shape, pin_memory=pinned))

    def left(self, ids_MA: Tensor, weights_MA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the GPU is to do: ids, weights, and what is to be added."""
        return self._left

    def run(self) -> None:
        """Have some come and compute the others; the host waits for the router's choice and for its own work."""
        self.prepare()
        table, (ids, weights, y, extra) = self.table, self._seen
        look(table.store, [ids], self.given[:1])
        chosen = list(dict.fromkeys(ids.flatten().tolist()))
        mine, anchor = self._mine(chosen)
        # Asked for before the experts are: after that the GPU waits for these.
        there = _copy(table.store, [weights, y], self.given[1:]) if mine else None
        table.bring([expert for expert in chosen if expert not in mine] or [anchor])
        if not mine:
            return
        table.store.lane.join(there)
        extra.zero_()
        for expert in mine:
            pairs = ids == expert
            tokens = pairs.any(dim=1)
            share = (weights * pairs).sum(1)[tokens, None]
            extra[0, tokens] += share * self.processor((table.layer, expert), y[tokens])
            ids[pairs], weights[pairs] = anchor, 0.0
        table.store.count_computed(len(mine))
        for place, new in zip(self._left, (ids, weights, extra), strict=True):
            place.copy_(new, non_blocking=True)

    def _mine(self, chosen: list[int]) -> tuple[list[int], int]:
        """The experts to compute here, and one that the GPU has or gets in their place."""
        store, layer = self.table.store, self.table.layer
        missing = [expert for expert in chosen if not store.is_here(layer, expert)]
        able = [expert for expert in missing if (layer, expert) in self.processor.keys]
        mine = able[: shared_out(len(missing), self.table.copy_s, self.table.compute_s)]
        others = [expert for expert in chosen if expert not in mine] or list(store.tiering.resident.get(layer, ()))[:1]
        if not others:  # nothing of this layer is on the GPU: one has to come
            return mine[1:], mine[0]
        return mine, others[0]
