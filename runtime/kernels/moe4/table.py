"""The experts of a layer on CUDA: a record for each, and a table that says where each one lies.

Axes: M tokens, A experts chosen for each, D hidden, F expert hidden, E experts.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import decode_absmax, level_table
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import skinny, tile
from minibble.runtime.kernels.linear4.decoded import linear_decoded
from minibble.runtime.kernels.nvrtc import KernelError
from minibble.runtime.kernels.tiles import HALF_SCALE, TileLayout, pack, usable

if TYPE_CHECKING:
    from minibble.runtime.pipeline import Pause

FEW = 64  # tokens up to which the kernel for few of them is the quicker
MOST = torch.finfo(torch.float16).max / HALF_SCALE  # of a weight, for the one for many: 1,023


class RecordTable:
    """Experts in the kernels' layout: in a record gate and up [2F, D], their rows alternating by 16, then down [D, F].

    `addresses`, int64 [E] on the device, is all that kernels see of them; who holds the records says `record`.
    """

    def __init__(self, gate_up: TileLayout, down: TileLayout, addresses: Tensor):
        self.gate_up, self.down, self.addresses = gate_up, down, addresses

    def record(self, expert: int) -> Tensor:
        """The record of `expert`, uint8 [record_nbytes]."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes on the device that are this layer's own."""
        raise NotImplementedError

    def fetch(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> "Pause | None":
        """The pause that a decode step must make before it uses the experts `ids`, on the device; None if all are
        there."""
        return None

    def put(self, expert: int, kind: Literal["gate_up", "down"], parts: Sequence[QuantizedTensor]) -> None:
        """Lay out gate and up of `expert`, [F, D] each, or its down, [D, F]; `parts` lie on any device."""
        self.lay_out(self.record(expert), kind, parts)

    def lay_out(self, record: Tensor, kind: Literal["gate_up", "down"], parts: Sequence[QuantizedTensor]) -> None:
        """`put` to a record that is given."""
        start = self.gate_up.nbytes
        layout, place = (self.gate_up, record[:start]) if kind == "gate_up" else (self.down, record[start:])
        pack([q.to(record.device) for q in parts], layout, place)

    def __call__(self, x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
        """Parts whose sum is the weighted one of each token's experts, [S, M, D], float32 or bfloat16."""
        x = x_MD.to(torch.bfloat16).contiguous()
        if len(x) <= FEW:
            return self.decode(x, ids_MA.int(), weights_MA)
        if tile.available(x.device):
            start = self.gate_up.nbytes
            return tile.experts(x, ids_MA, weights_MA, self.addresses, self.gate_up, self.down, start)
        return self._one_by_one(x, ids_MA, weights_MA)[None]

    def decode(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, fetch: "Pause | None" = None) -> Tensor:
        """Parts whose sum is that of each token's experts, float32 [S, M, D], of up to FEW tokens.

        `y_MD` bfloat16, `ids_MA` int32, `weights_MA` float32; `fetch` is the pause made for these, if one was. Nothing
        waits for the device.
        """
        return self.read(self.addresses, y_MD, ids_MA, weights_MA)

    def read(
        self,
        addresses_E: Tensor,
        y_MD: Tensor,
        ids_MA: Tensor,
        weights_MA: Tensor,
        units_MA: Tensor | None = None,
    ) -> Tensor:
        """`decode` of records at other addresses than the table's, float32 [A * S, M, D].

        Of the hidden units of a pair whose expert no other has, only the first `units_MA` count, int32, multiples of
        COLUMNS; entries of other pairs must be F. All count by default.
        """
        (M, A), device, E = ids_MA.shape, y_MD.device, len(addresses_E)
        if not M:
            return torch.zeros(1, 0, self.down.N, device=device)
        most = skinny.most_tokens(self.gate_up, device, True, A, E)
        most = min(most, skinny.most_tokens(self.down, device, False, A, E))
        if not most:
            raise KernelError(f"{device}: too little shared memory for one token through these experts")
        if most < M:  # cards with less shared memory than Hopper's take them in turns
            given = (y_MD, ids_MA, weights_MA, units_MA)
            each = zip(*(tensor.split(most) for tensor in given if tensor is not None), strict=True)
            return torch.cat([self.read(addresses_E, *some).sum(0, keepdim=True) for some in each], dim=1)
        h = torch.empty(M * A, self.down.K, dtype=torch.bfloat16, device=device)
        # Made contiguous before the first launch: the second one reads the ids while that is still under way.
        ids_MA, weights_MA = ids_MA.contiguous(), weights_MA.contiguous()
        gate_up = skinny.Operand(self.gate_up, table=addresses_E)
        skinny.launch(gate_up, skinny.GATE_UP, y_MD.contiguous(), h, ids=ids_MA, units=units_MA)
        splits = skinny.splits_for(self.down, M, device, A, E)
        parts = torch.empty(A * splits, M, self.down.N, device=device)
        down = skinny.Operand(self.down, table=addresses_E, start=self.gate_up.nbytes)
        skinny.launch(down, skinny.DOWN, h, parts, ids=ids_MA, weights=weights_MA, units=units_MA, splits=splits)
        return parts

    def _one_by_one(self, x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
        """Many tokens before Hopper: the experts one after the other, decoded and multiplied by cuBLAS."""
        out = torch.zeros(x_MD.shape, device=x_MD.device)
        pairs, offsets = tile.sort_pairs(ids_MA, len(self.addresses))
        for expert, (first, last) in enumerate(pairwise(offsets.tolist())):
            if first == last:
                continue
            chosen = pairs[first:last]
            tokens, record = chosen // ids_MA.shape[1], self.record(expert)
            both = linear_decoded(x_MD[tokens], record, self.gate_up).view(last - first, -1, 2, 16)
            h = torch.nn.functional.silu(both[:, :, 0]) * both[:, :, 1]
            y = linear_decoded(h.flatten(1), record[self.gate_up.nbytes :], self.down, torch.float32)
            out.index_add_(0, tokens, y * weights_MA.reshape(-1)[chosen, None])
        return out


def largest(q: QuantizedTensor) -> float:
    """No weight of the matrix is larger than this; kernels can multiply with an expert's up to MOST."""
    return float(decode_absmax(q).abs().max() * level_table(q.levels, q.device).abs().max())


class ExpertTable(RecordTable):
    """All experts of a layer in `records`, uint8 [E, record_nbytes]."""

    @classmethod
    def empty(
        cls, experts: int, D: int, F: int, format: Format, dtype: torch.dtype, device: torch.device
    ) -> "ExpertTable | None":
        """Room for experts in `format`; None where the fused kernels cannot take them or activations of `dtype`."""
        layouts = record_layouts(D, F, format, dtype, device)
        return None if layouts is None or experts > skinny.MAX_EXPERTS else cls(experts, *layouts, device)

    def __init__(self, experts: int, gate_up: TileLayout, down: TileLayout, device: torch.device):
        self.records = torch.empty(experts, gate_up.nbytes + down.nbytes, dtype=torch.uint8, device=device)
        first, step = self.records.data_ptr(), self.records.stride(0)
        addresses = torch.arange(first, first + experts * step, step, device=device)[:experts]
        super().__init__(gate_up, down, addresses)

    @property
    def nbytes(self) -> int:
        return self.records.nbytes

    def record(self, expert: int) -> Tensor:
        return self.records[expert]


def record_layouts(
    D: int, F: int, format: Format, dtype: torch.dtype, device: torch.device
) -> tuple[TileLayout, TileLayout] | None:
    """Of an expert's gate and up, and of its down; None where the fused kernels cannot take them or `dtype`."""
    if device.type != "cuda" or not usable(dtype):
        return None
    gate_up, down = TileLayout.of_format((F, F), D, format, True), TileLayout.of_format((D,), F, format)
    return None if gate_up is None or down is None else (gate_up, down)
