"""A decode step's missing experts, divided between copy engine and CPU. Axes: M tokens, A active, D hidden."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minibble.runtime.experts.lanes import Mark
from minibble.runtime.experts.processor import Processor
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
    """As `table.Fetch`, but of missing experts only the first hidden units come, and the last ones are computed here.

    `units`, int32 [M, A], are how many of each pair's are left to the GPU, and `extra`, float32 [1, M, D], is what the
    others add. The stretch before fills both as if nothing were computed here, so that most layers cost no more than
    without.
    """

    def __init__(self, table: "OffloadedTable", processor: Processor, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor):
        self.table, self.processor = table, processor
        self.given, self.device = (ids_MA, weights_MA, y_MD), y_MD.device
        self.extra = torch.zeros(1, *y_MD.shape, device=y_MD.device)
        self.units = torch.full_like(ids_MA, table.down.K, dtype=torch.int32)
        self._seen: list[Tensor] = []

    def prepare(self) -> None:
        """Make room in host memory."""
        if not self._seen:
            pinned = self.device.type == "cuda"
            self._seen = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned) for x in (*self.given, self.extra, self.units)
            ]

    def left(self) -> tuple[Tensor, Tensor]:
        """How many hidden units of each pair the GPU is to compute, and what is to be added."""
        return self.units, self.extra

    def run(self) -> None:
        """Have experts come and compute the rest of them; the host waits for the router's choice and its own work."""
        self.prepare()
        table, (ids, weights, y, extra, units) = self.table, self._seen
        look(table.store, [ids], self.given[:1])
        chosen = ids.flatten().tolist()
        mine = self._mine(chosen)
        # Asked for before the experts are: after that the GPU waits for these.
        there = _copy(table.store, [weights, y], self.given[1:]) if mine else None
        table.bring(chosen, mine)
        if not mine:
            return
        table.store.lane.join(there)
        extra.zero_()
        units.fill_(table.down.K)
        for expert in mine:
            token, slot = divmod(chosen.index(expert), ids.shape[1])
            extra[0, token] += weights[token, slot] * self.processor((table.layer, expert), y[token : token + 1])[0]
            units[token, slot] -= self.processor.units
        for place, new in ((self.units, units), (self.extra, extra)):
            place.copy_(new, non_blocking=True)

    def _mine(self, chosen: list[int]) -> list[int]:
        """The experts to compute a part of: those that have to come from host memory, and have one token. For more the
        CPU takes longer, and a copy does not."""
        store, layer, able = self.table.store, self.table.layer, self.processor.keys
        return [
            expert for expert in dict.fromkeys(chosen)
            if (layer, expert) in able and chosen.count(expert) == 1 and store.waits_in_host(layer, expert)
        ]  # fmt: skip
