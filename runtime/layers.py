"""The small modules that everything else is made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minibble.quantize.nf4_math import decode_rows
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import Packed, Weight, linear
from minibble.runtime.kernels.norm import rms_norm


class Linear(nn.Module):
    """y = x W^T, W [N, K] as a tensor (`weight`) or in 4 bits (`packed`)."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.shape = (rows, columns)
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.packed: Packed | None = None

    def set_packed(self, packed: Packed) -> None:
        """Hold the matrix in 4 bits."""
        assert packed.shape == self.shape, f"{packed.shape} in the place of {self.shape}"
        self.weight, self.packed = None, packed

    @property
    def held(self) -> Weight:
        """The matrix, whichever way it is held."""
        held = self.weight if self.packed is None else self.packed
        assert held is not None
        return held

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None, factors: Tensor | None = None) -> Tensor:
        return linear(x, self.held, out_dtype, factors)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32; the result is float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device="meta"))
        self._copies: dict[torch.device, Tensor] = {}

    def weight_on(self, device: torch.device) -> Tensor:
        """The weight where x is: the norm after a device's last layer belongs to the first layer of the next one."""
        if self.weight.device == device:
            return self.weight
        if device not in self._copies:
            self._copies[device] = self.weight.detach().to(device)
        return self._copies[device]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._copies.clear()
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def residual(x: Tensor, alpha: float, y: Tensor, beta: float) -> Tensor:
    """alpha x + beta y."""
    return torch.add(y if beta == 1 else beta * y, x, alpha=alpha)


class Embedding(nn.Module):
    """Rows of a table [V, D], held as a tensor or in 4 bits; looked up in `dtype`.

    A tensor may be in host memory while its rows are wanted `on` a GPU.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.packed: QuantizedTensor | None = None
        self.on: torch.device | None = None  # None: where the table is

    def set_packed(self, packed: QuantizedTensor) -> None:
        """Hold the table in 4 bits."""
        self.weight, self.packed = None, packed

    @property
    def device(self) -> torch.device:
        """Where token ids go, and rows come."""
        return self._table if self.on is None else self.on

    @property
    def elsewhere(self) -> bool:
        """True if rows come from another device than where they are wanted: the host must know the ids."""
        return self._table != self.device

    @property
    def _table(self) -> torch.device:
        if self.packed is not None:
            return self.packed.codes.device
        assert self.weight is not None
        return self.weight.device

    @property
    def host_nbytes(self) -> int:
        """Of a table that is in host memory for a GPU."""
        return 0 if self.weight is None or not self.elsewhere else self.weight.nbytes

    def known(self, ids: Tensor) -> Tensor:
        """The ids where the table is; `forward` takes them from there as well."""
        return ids.to(self._table)

    def forward(self, ids: Tensor) -> Tensor:
        if self.packed is not None:
            return decode_rows(self.packed, ids).to(self.dtype)
        assert self.weight is not None
        if not self.elsewhere:
            return F.embedding(ids, self.weight).to(self.dtype)
        ids = self.known(ids)
        shape = (*ids.shape, self.weight.shape[1])
        rows = torch.empty(shape, dtype=self.weight.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(self.weight.detach(), 0, ids.flatten(), out=rows.view(-1, shape[-1]))
        return rows.to(self.device, non_blocking=True).to(self.dtype)
