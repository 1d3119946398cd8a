"""NF4 products on the CPU.

With AVX512-BF16 bitsandbytes multiplies straight from the codes, in bf16. Elsewhere, and for float32 activations, one
or two tokens go through our own loop (gemv.py, where numba is installed); for more, bitsandbytes decodes the matrix
and torch multiplies. Without bitsandbytes torch does both.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.nf4_math import decode, decode_absmax
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.compiled import available
from minibble.runtime.kernels.linear4 import gemv

_PACK_ROWS = 1024  # laid out at a time: on the way a code takes five bytes


@cache
def bitsandbytes() -> Any:
    """bitsandbytes' functional module, or None where it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return None
    return functional


@cache
def fused() -> Any:
    """bitsandbytes' kernel that multiplies from the codes, or None where this CPU or the package has none.

    It comes from the package's library for CPUs, also beside a GPU: there bitsandbytes loads another one, without it.
    """
    functional = bitsandbytes()
    if functional is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(functional.__file__).with_name("libbitsandbytes_cpu.so")))
        kernel = library.gemv_4bit_inference_cpu_nf4_bf16 if library.has_avx512bf16_cpu() else None
    except (OSError, AttributeError):  # another system, or another release
        return None
    if kernel is not None:
        number, place = ctypes.c_int64, ctypes.c_void_p
        kernel.argtypes = (number, number, number, place, place, place, place, number, number, number)
        kernel.restype = None
    return kernel


def has_fused() -> bool:
    """True where bitsandbytes has a kernel that multiplies from the codes on this CPU."""
    return fused() is not None


def fuses(N: int, K: int, dtype: torch.dtype) -> bool:
    """True if a matrix [N, K] is laid out for that kernel, for activations of `dtype`; its scales are then bfloat16."""
    return dtype == torch.bfloat16 and N % 32 == 0 and K % 64 == 0 and has_fused()


def path() -> str:
    """The path that one token's products take here: `fused`, `gemv`, `decode` (bitsandbytes decodes) or `torch`."""
    if has_fused():
        return "fused"
    if available():
        return "gemv"
    return "torch" if bitsandbytes() is None else "decode"


def _repacked(codes: Tensor, absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K/2] and absmax [N, blocks] as bitsandbytes' kernel reads them, on the device where they are."""
    functional, made = bitsandbytes(), []
    for some, scales in zip(codes.split(_PACK_ROWS), absmax.split(_PACK_ROWS), strict=True):
        state = functional.QuantState(
            absmax=scales.flatten(),
            shape=torch.Size((len(some), 2 * some.shape[1])),
            code=functional.get_4bit_type("nf4", device="cpu"),
            blocksize=block_size,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        packed, state = functional._convert_weight_packed_for_cpu(some.flatten(), state)
        made.append((packed, state.absmax))
    packed, scales = zip(*made, strict=True)
    return torch.cat(packed), torch.cat(scales, dim=1)


class PackedLinear:
    """The rows of one or several NF4 matrices of one width, laid out for this CPU. Second-level scales are resolved.

    The matrices may lie on a GPU, and are then laid out there as far as that is work.
    """

    def __init__(self, parts: list[QuantizedTensor], dtype: torch.dtype):
        first = parts[0]
        self.shape = (sum(q.shape[0] for q in parts), first.shape[1])
        self.block_size = first.block_size
        codes = torch.cat([q.codes for q in parts])
        absmax = torch.cat([decode_absmax(q) for q in parts])
        N, K = self.shape
        self.repacked = fuses(N, K, dtype)
        if self.repacked:
            codes, absmax = _repacked(codes.view(N, -1), absmax.view(N, -1), self.block_size)
        self.codes, self.absmax = codes.cpu(), absmax.cpu()
        self.arrays: gemv.Arrays | None = None
        if not self.repacked and available() and gemv.suits(N, K, self.block_size):
            self.arrays = gemv.arrays(self.codes, self.absmax, first.levels)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def __call__(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        if self.repacked:
            return self._fused(x).to(out_dtype)
        if self.arrays is not None and x.numel() <= gemv.TOKENS * self.shape[1] and not x.requires_grad:
            return gemv.linear(x, self.arrays, self.shape[0]).to(out_dtype)
        return torch.nn.functional.linear(x, self.decode(x.dtype)).to(out_dtype)

    def _fused(self, x: Tensor) -> Tensor:
        (N, K), rows = self.shape, x.detach().reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        out = torch.empty(len(rows), N, dtype=torch.bfloat16)
        fused()(
            len(rows), N, K, rows.data_ptr(), self.codes.data_ptr(), self.absmax.data_ptr(), out.data_ptr(),
            self.block_size, K, N,
        )  # fmt: skip
        return out.view(*x.shape[:-1], N)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K]; only for a matrix that was not repacked."""
        if bitsandbytes() is None:
            return decode(QuantizedTensor(self.shape, self.codes, self.absmax, block_size=self.block_size), dtype)
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes, self.absmax, self.block_size, "nf4", self.shape, dtype
        )
