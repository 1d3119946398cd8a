"""A layer's experts where some are elsewhere: brought by the store before the kernels ask for them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.experts.errands import Errand
from minibble.runtime.experts.in_place import Readable, worthwhile
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.kernels.moe4.table import FEW, RecordTable
from minibble.runtime.kernels.tiles import TileLayout

if TYPE_CHECKING:
    from minibble.runtime.pipeline import Pause

# Choices for each expert, on average, from which on all of them are brought without asking which ones: of 32 experts
# 4 choices each leave out half of one.
ALL_FROM = 4


class OffloadedTable(RecordTable):
    """The experts of `layer` in `store`, whose slots its layers share."""

    def __init__(self, store: ExpertStore, layer: int, gate_up: TileLayout, down: TileLayout):
        super().__init__(gate_up, down, store.addresses(layer))
        self.store, self.layer = store, layer
        self.following: OffloadedTable | None = None  # that of the next layer in the same store

    @property
    def nbytes(self) -> int:
        return 0  # the store's are counted by themselves

    def record(self, expert: int) -> Tensor:
        return self.store.record(self.layer, expert)

    def put(self, expert: int, kind: Literal["gate_up", "down"], parts: Sequence[QuantizedTensor]) -> None:
        """As of all tables; gate and up come before down, after which the record is complete."""
        place = self.store.put(self.layer, expert)
        self.lay_out(place, kind, parts)
        if self.store.errands is not None:
            self.store.errands.processor.put((self.layer, expert), kind, parts)
        if kind == "down":
            self.store.done(self.layer, expert)

    def __call__(self, x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
        """As of all tables; each expert is brought once, and serves all its tokens, or is read in place."""
        if len(x_MD) <= FEW and self._at_hand(ids_MA):
            return super().__call__(x_MD, ids_MA, weights_MA)
        everything = range(len(self.addresses))
        many = ids_MA.numel() >= ALL_FROM * len(everything)
        self.bring(everything if many else ids_MA.unique().tolist())
        try:
            if many and self.following is not None:  # the next layer will want all of its experts, too
                self.store.prefetch(self.following.layer, everything)
            return super().__call__(x_MD, ids_MA, weights_MA)
        finally:
            self.store.used(self.layer)

    def fetch(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> "Fetch | Errand | None":
        if not self._at_hand(ids_MA):
            return Fetch(self, ids_MA)
        errands = self.store.errands
        return None if errands is None else errands.ask(self.layer, y_MD, ids_MA, weights_MA)

    def decode(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, fetch: "Pause | None" = None) -> Tensor:
        readable = self._readable(ids_MA)
        if readable is None:
            return super().decode(y_MD, ids_MA, weights_MA)
        from minibble.runtime.kernels.moe4.reads import count_reads

        count_reads(ids_MA.contiguous(), readable.far, readable.counts)
        if not isinstance(fetch, Errand):
            return self.read(readable.addresses, y_MD, ids_MA, weights_MA)
        return torch.cat([self.read(readable.addresses, y_MD, ids_MA, weights_MA, fetch.left), fetch.receive()])

    @property
    def _missing(self) -> int:
        """Experts that are not on the device for good."""
        return len(self.addresses) - len(self.store.tiering.resident.get(self.layer, ()))

    def _at_hand(self, ids_MA: Tensor) -> bool:
        """Whether kernels find what a step chose without anything being brought."""
        return not self._missing or self._readable(ids_MA) is not None

    def _readable(self, ids_MA: Tensor) -> Readable | None:
        """Where to read the experts of a step in place; None if they are to be brought, or nothing is missing."""
        if not worthwhile(ids_MA.numel(), self._missing, len(self.addresses)):
            return None
        return self.store.readable(self.layer)

    def bring(self, ids: Iterable[int]) -> None:
        """Have the experts `ids` there for what is issued from now on."""
        self.store.require(self.layer, ids)


class Fetch:
    """A pause of a decode step in which the experts `ids`, int32 [M, A], come that are not on the device.

    The host waits for the router's choice, and for nothing else.
    """

    ends = True

    def __init__(self, table: OffloadedTable, ids_MA: Tensor):
        self.table, self.ids, self.device = table, ids_MA, ids_MA.device
        self._seen: Tensor | None = None

    def prepare(self) -> None:
        """Make room for the ids in host memory."""
        if self._seen is None:
            self._seen = torch.empty(self.ids.shape, dtype=self.ids.dtype, pin_memory=self.ids.is_cuda)

    def run(self) -> None:
        """Bring the experts."""
        self.prepare()
        assert self._seen is not None
        store = self.table.store
        store.used_all()  # the experts of the layers before
        self._seen.copy_(self.ids, non_blocking=True)
        store.lane.join(store.lane.mark())
        self.table.bring(self._seen.flatten().tolist())
