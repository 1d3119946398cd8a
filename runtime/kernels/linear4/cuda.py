"""4-bit products on CUDA: straight from the codes for bfloat16 activations, else decoded and multiplied by cuBLAS."""

import torch
from torch import Tensor

from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import skinny, slices, tile
from minibble.runtime.kernels.linear4.decode import decode_into
from minibble.runtime.kernels.linear4.decoded import linear_decoded
from minibble.runtime.kernels.linear4.stored import StoredParts
from minibble.runtime.kernels.tiles import TileLayout, pack, usable

FEW = 16  # tokens up to which the kernels for few of them are the quicker
# Tokens up to which a matrix so large that K need not be cut is better read by jobs than by slices: on an H100
# 32768 x 6144 took, by jobs, one token 36.5 us, two 37.6, four 38.9; by slices 38.5, 38.5, 38.7.
FEW_OF_WHOLE = 2
# Tokens up to which jobs make parts that others add: they have fewer of them than slices, and put none together. Whole
# layers took one token 101.9 us on an H200 and with slices 103.1, eight tokens 162.2 and 160.6, 16 258 and 253.
FEW_OF_PARTS = 4


def prepare(parts: list[QuantizedTensor], dtype: torch.dtype) -> "TiledLinear | StoredLinear":
    """The rows of `parts`, which lie on a CUDA device, for activations of `dtype`."""
    layout = TileLayout.of(parts) if usable(dtype) else None
    return StoredLinear(parts) if layout is None else TiledLinear(pack(parts, layout), layout)


class TiledLinear:
    """A matrix [N, K] in the kernels' layout, uint8 [layout.nbytes]."""

    def __init__(self, data: Tensor, layout: TileLayout):
        self.data, self.layout = data, layout
        self.shape = (layout.N, layout.K)
        self.operand = skinny.Operand(layout, data)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        kernel_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
        return self._product(x_MK, kernel_dtype).to(out_dtype).view(*x.shape[:-1], self.shape[0])

    def scaled(self, x: Tensor, factors: Tensor, out_dtype: torch.dtype) -> Tensor | None:
        """The product, each row times its one of `factors`, float32; None where the kernel for many tokens does not
        make it."""
        if out_dtype != torch.bfloat16 or factors.numel() <= self._few(x.device) or not tile.available(x.device):
            return None
        x_MK = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y_MN = tile.linear(x_MK, self.data, self.layout, factors=factors.reshape(-1))
        return y_MN.view(*x.shape[:-1], self.shape[0])

    def _product(self, x_MK: Tensor, out_dtype: torch.dtype) -> Tensor:
        M = len(x_MK)
        if self._few(x_MK.device) < M:
            many = tile.linear if tile.available(x_MK.device) else linear_decoded
            return many(x_MK, self.data, self.layout, out_dtype)
        if out_dtype == torch.float32:
            return self.partial(x_MK).sum(0)
        shape, splits = self._slices(M, x_MK.device), self._splits(M, x_MK.device)
        if shape is None and splits != 1:
            return self.partial(x_MK).sum(0).to(out_dtype)
        out = torch.empty(M, self.shape[0], dtype=out_dtype, device=x_MK.device)
        if shape is not None:
            slices.launch(self.layout, self.data, shape, x_MK, out)
        else:
            skinny.launch(self.operand, skinny.BFLOAT16, x_MK, out)
        return out

    def partial(self, x_MK: Tensor) -> Tensor:
        """Sums over parts of K that add up to the product, float32 [S, M, N], of x bfloat16 [M, K]."""
        M, x_MK = len(x_MK), x_MK.contiguous()
        if not M:
            return torch.zeros(1, 0, self.shape[0], device=x_MK.device)
        if self._few(x_MK.device) < M:
            return self._product(x_MK, torch.float32).unsqueeze(0)
        shape = self._slices(M, x_MK.device) if M > FEW_OF_PARTS else None
        splits = self._splits(M, x_MK.device) if shape is None else shape.splits
        out = torch.empty(splits, M, self.shape[0], device=x_MK.device)
        if shape is not None:
            slices.launch(self.layout, self.data, shape, x_MK, out)
        else:
            skinny.launch(self.operand, skinny.PARTS, x_MK, out, splits=splits)
        return out

    def _slices(self, M: int, device: torch.device) -> slices.Shape | None:
        """How M tokens are multiplied by slices; None if by jobs."""
        if 0 < M <= FEW_OF_WHOLE and self._splits(M, device) == 1:
            return None
        return slices.shape_for(self.layout, M, device)

    def _splits(self, M: int, device: torch.device) -> int:
        """Into how many parts jobs cut K."""
        return skinny.splits_for(self.layout, M, device) if M else 0

    def _few(self, device: torch.device) -> int:
        return min(FEW, skinny.most_tokens(self.layout, device, False))


class StoredLinear(StoredParts):
    """A matrix resident as it is stored, second-level scales included; decoded whole for every product."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        weight = self.decode(x.dtype)
        if out_dtype == x.dtype:
            return torch.nn.functional.linear(x, weight)
        return torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=out_dtype).unflatten(0, x.shape[:-1])

    def partial(self, x_MK: Tensor) -> Tensor:
        """The product, float32 [1, M, N], of x bfloat16 [M, K]."""
        return self(x_MK, torch.float32).unsqueeze(0)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in `dtype`."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.parts[0].device)
        row = 0
        for q in self.parts:
            decode_into(weight[row : row + q.shape[0]], q)
            row += q.shape[0]
        return weight
