"""The scales of 4-bit matrices as the file can hold them, while codes are being chosen.

Axes: B matrices, N rows, K columns, G groups of columns that share a scale. Rows of several stored matrices that see
the same input lie one under the other; `parts` are their numbers of rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minibble.quantize.errors import CalibrationError
from minibble.quantize.formats import Format
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import dynamic_map, encode_absmax, nearest_levels
from minibble.quantize.tensors import NESTED_BLOCK
from minibble.runtime.kernels.feedback import inverse

_LEAST_HALF = 2.0**-24  # the least float16 above 0


class Grid(Protocol):
    """The values that scales may take."""

    def nearest(self, wished_BN: Tensor, group: int) -> Tensor:
        """For each wished scale of a group the nearest that can be stored, float32 [B, N]."""
        ...

    def stored(self, scale_BGN: Tensor, b: int, rows: slice) -> tuple[Tensor, Tensor | None, float | None]:
        """What a file holds for some rows of a matrix: scales row by row, second-level scales, their offset."""
        ...


@dataclass(frozen=True)
class Float32Grid:
    """Scales as float32 numbers: NF4 without double quantization."""

    def nearest(self, wished_BN: Tensor, group: int) -> Tensor:
        return wished_BN

    def stored(self, scale_BGN: Tensor, b: int, rows: slice) -> tuple[Tensor, None, None]:
        return scale_BGN[b, :, rows].t().reshape(-1), None, None


@dataclass(frozen=True)
class Float16Grid:
    """Positive scales as float16 numbers: GPTQ's files."""

    def nearest(self, wished_BN: Tensor, group: int) -> Tensor:
        return wished_BN.clamp(min=_LEAST_HALF, max=torch.finfo(torch.float16).max).half().float()

    def stored(self, scale_BGN: Tensor, b: int, rows: slice) -> tuple[Tensor, None, None]:
        return scale_BGN[b, :, rows].t().reshape(-1).half(), None, None


@dataclass(frozen=True)
class DoubleQuantizedGrid:
    """Scales in bitsandbytes' double quantization, whose second level is fixed.

    nested_BGN: second-level absmax above each scale; offset_BN: the mean scale of the stored matrix a row belongs to;
    second: for each matrix and the first row of each part its second-level absmax as stored, and the offset.
    """

    nested_BGN: Tensor
    offset_BN: Tensor
    second: dict[tuple[int, int], tuple[Tensor, float]]

    @classmethod
    def of(cls, scale_BGN: Tensor, parts: list[int]) -> "DoubleQuantizedGrid":
        """The grid that `encode_absmax` gives to the scales of each stored matrix."""
        B, G, N = scale_BGN.shape
        nested_BGN, offset_BN = torch.empty_like(scale_BGN), scale_BGN.new_empty(B, N)
        second = {}
        for b in range(B):
            start = 0
            for count in parts:
                rows = slice(start, start + count)
                flat = scale_BGN[b, :, rows].t().reshape(-1)
                _, nested, offset = encode_absmax(flat)
                each = nested.repeat_interleave(NESTED_BLOCK)[: flat.numel()]
                nested_BGN[b, :, rows] = each.view(count, G).t()
                offset_BN[b, rows] = offset
                second[b, start] = nested, offset
                start += count
        return cls(nested_BGN, offset_BN, second)

    def nearest(self, wished_BN: Tensor, group: int) -> Tensor:
        nested = self.nested_BGN[:, group]
        index = nearest_levels((wished_BN - self.offset_BN) * inverse(nested), dynamic_map(wished_BN.device))
        return dynamic_map(wished_BN.device)[index.int()] * nested + self.offset_BN

    def stored(self, scale_BGN: Tensor, b: int, rows: slice) -> tuple[Tensor, Tensor, float]:
        nested, offset = self.second[b, rows.start]
        unit = (scale_BGN[b, :, rows] - offset) * inverse(self.nested_BGN[b, :, rows])
        return nearest_levels(unit, dynamic_map(unit.device)).t().reshape(-1), nested, offset


def grid_for(format: Format, scale_BGN: Tensor, parts: list[int]) -> Grid:
    """The grid on which `format` stores scales like these; CalibrationError if they are beyond it."""
    if not isinstance(format, NF4):
        if scale_BGN.max() > torch.finfo(torch.float16).max:
            raise CalibrationError(f"a scale is {scale_BGN.max():.3g}, more than the float16 of GPTQ's files holds")
        return Float16Grid()
    return DoubleQuantizedGrid.of(scale_BGN, parts) if format.double_quant else Float32Grid()
