"""y = x W^T with W in 4 bits (or in 16 and more): the one place that chooses how."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.linear4.stored import StoredParts

if TYPE_CHECKING:
    from minibble.runtime.kernels.linear4.gemv import Arrays


class Packed(Protocol):
    """A 4-bit matrix [N, K] in some kernel's own layout."""

    shape: tuple[int, int]

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor: ...


class ReferencePacked(StoredParts):
    """The reference path as a kernel: float32 throughout."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        from minibble.runtime.kernels.linear4 import reference

        return reference.linear(x, self.parts).to(out_dtype)


def prepare(parts: list[QuantizedTensor], device: torch.device, dtype: torch.dtype) -> Packed:
    """Lay out `parts` (equal K, whole blocks per row, rows in order) on `device` for activations of `dtype`; they may
    lie elsewhere."""
    assert len({(q.shape[1], q.levels) for q in parts}) == 1, "parts of different widths or levels"
    if parts[0].shape[1] % parts[0].block_size:
        raise CheckpointError(f"rows of {parts[0].shape[1]} weights are not whole blocks of {parts[0].block_size}")
    if reference_forced():
        return ReferencePacked([q.to(device) for q in parts])
    if device.type == "cpu":
        from minibble.runtime.kernels.linear4 import cpu, cpu_int4

        return cpu.PackedLinear(parts, dtype) if parts[0].levels == "nf4" else cpu_int4.PackedLinear(parts, dtype)
    from minibble.runtime.kernels.linear4 import cuda

    return cuda.prepare([q.to(device) for q in parts], dtype)


Weight = Tensor | Packed


def gemv_arrays(weight: Weight) -> "Arrays | None":
    """The arrays of a matrix that is laid out for the CPU's compiled loop; None for any other."""
    return getattr(weight, "arrays", None)


def linear(x: Tensor, weight: Weight, out_dtype: torch.dtype | None = None, factors: Tensor | None = None) -> Tensor:
    """x [..., K] times `weight` [N, K] transposed: [..., N] in `out_dtype` (default: that of x).

    With `out_dtype` float32 the sums leave the product unrounded. Each row of the result is multiplied by its one of
    `factors`, float32 [...].
    """
    out_dtype = out_dtype or x.dtype
    if factors is not None:
        scaled = getattr(weight, "scaled", None)
        made: Tensor | None = None if scaled is None else scaled(x, factors, out_dtype)
        return (linear(x, weight, torch.float32) * factors[..., None]).to(out_dtype) if made is None else made
    if not isinstance(weight, Tensor):
        return weight(x, out_dtype)
    if out_dtype == x.dtype == weight.dtype:
        return torch.nn.functional.linear(x, weight)
    if x.is_cuda and x.dtype == weight.dtype:
        return torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=out_dtype).unflatten(0, x.shape[:-1])
    return torch.nn.functional.linear(x.to(weight.dtype), weight).to(out_dtype)
