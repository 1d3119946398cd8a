"""Int4 products on the CPU.

For bfloat16 activations torch's own kernel multiplies from the codes, where it can do the shape. Its float32 variant is
exact but not vectorised, so float32 goes the way of NF4: one or two tokens through the compiled loop (gemv.py, where
numba is installed), more through the decoded matrix.

6144 x 9216 in groups of 128, one thread with AVX2, one token: torch's kernel 9 ms in bfloat16 and 145 ms in float32,
the compiled loop 22 ms, decoding and multiplying 190 ms. Relative error to float64: torch's kernel in bfloat16 2.2e-3
(1.7e-3 from rounding the result, the rest from rounding the scales; decoded to bfloat16 it is 2.3e-3), the others 1e-6.
"""

import torch
from torch import Tensor

from minibble.quantize.nf4_math import decode, decode_absmax
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.compiled import available
from minibble.runtime.kernels.linear4 import cpu, gemv

GROUPS = (32, 64, 128, 256)  # sizes that torch's kernel can do
ROWS = 16  # it takes whole multiples of so many rows
_PACK_ROWS = 1024  # rows laid out at a time: the kernel's layout is by blocks of 32 or 64 rows


def has_kernel(N: int, K: int, group_size: int) -> bool:
    """True for shapes that torch's kernel can do."""
    return N % ROWS == 0 and K % group_size == 0 and group_size in GROUPS


def path() -> str:
    """The path that one token's products take here, in the dtype that suits this CPU: `kernel` (torch's), `gemv` or
    `torch` (which decodes and multiplies)."""
    if cpu.has_fused():
        return "kernel"
    return "gemv" if available() else "torch"


class PackedLinear:
    """The rows of one or several int4 matrices of one width, laid out for this CPU."""

    def __init__(self, parts: list[QuantizedTensor], dtype: torch.dtype):
        first = parts[0]
        parts = [q.to("cpu") for q in parts]  # torch lays out there
        N, K = self.shape = (sum(q.shape[0] for q in parts), first.shape[1])
        self.group_size = first.block_size
        self.codes = torch.cat([q.codes for q in parts])
        self.scales = torch.cat([decode_absmax(q) for q in parts])
        self.kernel = dtype == torch.bfloat16 and has_kernel(N, K, self.group_size)
        self.arrays: gemv.Arrays | None = None
        if self.kernel:
            self.codes = kernel_codes(self.codes.view(N, K // 2))
            self.scales = kernel_scales(self.scales.view(N, -1))
        elif available() and gemv.suits(N, K, self.group_size):
            self.arrays = gemv.arrays(self.codes, self.scales, first.levels)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        N, K = self.shape
        if self.kernel:
            rows = x.to(torch.bfloat16).reshape(-1, K).contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group_size, self.scales)
            return y.to(out_dtype).view(*x.shape[:-1], N)
        if self.arrays is not None and x.numel() <= gemv.TOKENS * K and not x.requires_grad:
            return gemv.linear(x, self.arrays, N).to(out_dtype)
        return torch.nn.functional.linear(x, self.decode(x.dtype)).to(out_dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K]; only for a matrix that is not laid out for torch's kernel."""
        scales = self.scales.half()
        q = QuantizedTensor(self.shape, self.codes, scales, block_size=self.group_size, levels="int4")
        return decode(q, dtype)


def kernel_codes(codes: Tensor) -> Tensor:
    """Codes, uint8 [N, K/2] with the first in the high nibble, in the layout of torch's kernel on this CPU, uint8."""
    pieces = []
    for piece in codes.split(_PACK_ROWS):
        each = torch.stack((piece >> 4, piece & 0xF), dim=-1).flatten(1)
        pieces.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(each.int(), 1))
    return torch.cat(pieces)


def kernel_scales(scales: Tensor) -> Tensor:
    """Scales [N, G] beside the zeros of torch's kernel, which are what code 8 stands for: bfloat16 [G, N, 2]."""
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
