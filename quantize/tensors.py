"""A matrix in 4 bits: its codes, its scales and what they mean."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError

NESTED_BLOCK = 256  # blocks whose absmax share one second-level absmax (bitsandbytes' double quantization)


@dataclass(frozen=True)
class QuantizedTensor:
    """An NF4 matrix [N, K] as bitsandbytes stores it.

    codes: uint8 [ceil(N*K / 2)], the first of two weights in the high nibble, row by row.
    absmax: one per block of `block_size` consecutive weights; float32, or uint8 indices into bitsandbytes'
    dynamic map if `nested_absmax` (float32, one per 256 blocks) and `nested_offset` are given.
    """

    shape: tuple[int, int]
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: float | None = None
    block_size: int = 64
    source_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        blocks = -(-prod(self.shape) // self.block_size)
        self._expect("codes", self.codes, torch.uint8, -(-prod(self.shape) // 2))
        nested = self.nested_absmax is not None
        self._expect("absmax", self.absmax, torch.uint8 if nested else torch.float32, blocks)
        if self.nested_absmax is not None:
            self._expect("nested_absmax", self.nested_absmax, torch.float32, -(-blocks // NESTED_BLOCK))
            if self.nested_offset is None:
                raise CheckpointError("nested_offset is missing beside nested_absmax")

    def _expect(self, what: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
        if tensor.dtype != dtype or tuple(tensor.shape) != (length,):
            raise CheckpointError(
                f"{what} of a {self.shape} matrix is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {(length,)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in memory."""
        nested = 0 if self.nested_absmax is None else self.nested_absmax.nbytes
        return self.codes.nbytes + self.absmax.nbytes + nested

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "QuantizedTensor":
        """The same matrix on `device`."""
        nested = self.nested_absmax
        return replace(
            self,
            codes=self.codes.to(device, non_blocking=non_blocking),
            absmax=self.absmax.to(device, non_blocking=non_blocking),
            nested_absmax=None if nested is None else nested.to(device, non_blocking=non_blocking),
        )
