"""Hidden units that are computed elsewhere, set to 0. P pairs of token and expert, F units of each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.overlap import launch_options, wait

_BLOCK = 1024


@triton.jit
def _clear_kernel(p_h, p_units, F: tl.constexpr, BLOCK_F: tl.constexpr, OVERLAP: tl.constexpr):
    pair = tl.program_id(0)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    wait(OVERLAP)
    first = tl.load(p_units + pair)
    nothing = tl.zeros((BLOCK_F,), dtype=p_h.dtype.element_ty)
    tl.store(p_h + pair * F + o_f, nothing, mask=(o_f >= first) & (o_f < F))


def clear_after(h_PF: Tensor, units: Tensor) -> None:
    """Set h[p, units[p]:] to 0, whatever it is; `units` is int32 [P]."""
    P, F = h_PF.shape
    assert h_PF.is_contiguous() and units.is_contiguous() and units.shape == (P,)
    with torch.cuda.device_of(h_PF):  # Triton launches on the current device
        _clear_kernel[(P, triton.cdiv(F, _BLOCK))](
            h_PF, units, F=F, BLOCK_F=_BLOCK, num_warps=4, **launch_options(h_PF.device)
        )
