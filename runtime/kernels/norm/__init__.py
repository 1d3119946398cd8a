"""RMSNorm: x / rms(x) * weight, in float32."""

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.compiled import available


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D] in any float dtype, `weight_D` float32 [D]: float32 [..., D]."""
    x = x.float()
    one = x.numel() == weight_D.shape[0] and not x.is_cuda and not torch.is_grad_enabled()
    if one and available() and not reference_forced():
        from minibble.runtime.kernels.norm import compiled

        return compiled.rms_norm(x, weight_D, eps)
    # torch's own rms_norm takes three times as long for one token on a CPU.
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D
