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


class PackedLinear:
    """The rows of one or several NF4 matrices of one width, laid out for this CPU. Second-level scales are resolved."""

    def __init__(self, parts: list[QuantizedTensor], dtype: torch.dtype):
        first = parts[0]
        self.shape = (sum(q.shape[0] for q in parts), first.shape[1])
        self.block_size = first.block_size
        self.codes = torch.cat([q.codes for q in parts])
        self.absmax = torch.cat([decode_absmax(q) for q in parts])
        self.repacked = False
        N, K = self.shape
        self.arrays: gemv.Arrays | None = None
        if fuses(N, K, dtype):
            self._repack()
        elif available() and gemv.suits(N, K, self.block_size):
            self.arrays = gemv.arrays(self.codes, self.absmax, first.levels)

    def _repack(self) -> None:
        functional = bitsandbytes()
        state = functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=functional.get_4bit_type("nf4", device="cpu"),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        self.codes, state = functional._convert_weight_packed_for_cpu(self.codes, state)
        self.absmax, self.repacked = state.absmax, True

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
