"""RMSNorm: x / rms(x) * weight, in float32; alone, and of a residual and what is added to it."""

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.compiled import available
from minibble.runtime.kernels.norm import reference


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., D] in any float dtype, `weight_D` float32 [D]: [..., D] in `dtype`, which gradients pass."""
    if _fused(x, weight_D):
        from minibble.runtime.kernels.norm.fused import norm_rows

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return norm_rows(rows, None, 1.0, 0.0, weight_D, eps, dtype).view(x.shape)
    x = x.float()
    one = x.numel() == weight_D.shape[0] and not x.is_cuda and not torch.is_grad_enabled()
    if one and available() and not reference_forced():
        from minibble.runtime.kernels.norm import compiled

        return compiled.rms_norm(x, weight_D, eps).to(dtype)
    return reference.rms_norm(x, weight_D, eps).to(dtype)


def norm_residual(x: Tensor, parts: Tensor, alpha: float, beta: float, weight_D: Tensor, eps: float) -> Tensor:
    """rmsnorm(alpha x + beta sum over S of parts) * weight, [..., D] in the dtype of x; one launch on CUDA.

    `parts` [S, ..., D] is what is to be added in S summands, of any float dtype; `weight_D` is float32.
    """
    assert parts.shape[1:] == x.shape, f"parts {tuple(parts.shape)} of {tuple(x.shape)}"
    if _fused(x, weight_D, parts):
        from minibble.runtime.kernels.norm.fused import norm_rows

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        summands = parts.reshape(parts.shape[0], *rows.shape).contiguous()
        return norm_rows(rows, summands, alpha, beta, weight_D, eps, x.dtype).view(x.shape)
    return reference.norm_residual(x, parts, alpha, beta, weight_D, eps).to(x.dtype)


def _fused(x: Tensor, *others: Tensor) -> bool:
    if not x.is_cuda or x.dtype == torch.float64 or reference_forced():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)))
