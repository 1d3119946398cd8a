"""A matrix in 4 bits: its codes, its scales and what they mean."""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError

NESTED_BLOCK = 256  # blocks whose absmax share one second-level absmax (bitsandbytes' double quantization)

Levels = Literal["nf4", "int4"]


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix [N, K] in 4 bits: a weight is the level of its code times the scale of its block.

    codes: uint8 [ceil(N*K / 2)], the first of two weights in the high nibble, row by row.
    levels: what the 16 codes stand for, by name: see `nf4_math.level_table`.
    absmax: the scale of each block of `block_size` consecutive weights. "nf4": float32, or uint8 indices into
    bitsandbytes' dynamic map if `nested_absmax` (float32, one per 256 blocks) and `nested_offset` are given.
    "int4": float16, which is the value of one step between levels.
    """

    shape: tuple[int, int]
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: float | None = None
    block_size: int = 64
    source_dtype: torch.dtype = torch.bfloat16
    levels: Levels = "nf4"

    def __post_init__(self) -> None:
        if self.levels not in ("nf4", "int4"):
            raise CheckpointError(f"levels {self.levels!r} are unknown, expected 'nf4' or 'int4'")
        if self.levels == "int4" and (self.nested_absmax is not None or self.nested_offset is not None):
            raise CheckpointError("int4 has no second-level scales, found nested_absmax or nested_offset")
        blocks = -(-prod(self.shape) // self.block_size)
        self._expect("codes", self.codes, torch.uint8, -(-prod(self.shape) // 2))
        nested = self.nested_absmax is not None
        scales = torch.float16 if self.levels == "int4" else torch.uint8 if nested else torch.float32
        self._expect("absmax", self.absmax, scales, blocks)
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
