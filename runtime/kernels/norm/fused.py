"""RMSNorm of rows on CUDA in one launch, what they are the sum of added up on the way. A program takes a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.overlap import launch_options, wait

FEW = 64  # rows: below, a row's latency counts and many warps share it


@triton.jit(do_not_specialize=["M"])  # one compilation for all
def _norm_kernel(
    p_x, p_parts, p_weight, p_out, M, alpha, beta, eps,
    D: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    wait(OVERLAP)
    x = tl.load(p_x + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_d, mask=m_d, other=0.0)
    if S > 0:
        added = tl.load(p_parts + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        for s in tl.static_range(1, S):
            added += tl.load(p_parts + (s * M + row) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        x = alpha * x + beta * added
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(p_out + row * D + o_d, (x * scale * weight).to(p_out.dtype.element_ty), mask=m_d)


def norm_rows(
    x_MD: Tensor, parts_SMD: Tensor | None, alpha: float, beta: float, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """rmsnorm(alpha x + beta sum(parts)) * weight in `dtype`, [M, D]; without parts rmsnorm(x) * weight."""
    M, D = x_MD.shape
    assert x_MD.is_contiguous() and weight_D.is_contiguous() and weight_D.shape == (D,)
    assert parts_SMD is None or (parts_SMD.is_contiguous() and parts_SMD.shape[1:] == (M, D))
    out_MD = torch.empty(M, D, dtype=dtype, device=x_MD.device)
    if M == 0:
        return out_MD
    block_d = triton.next_power_of_2(D)
    with torch.cuda.device_of(x_MD):  # Triton launches on the current device
        _norm_kernel[(M,)](
            x_MD, x_MD if parts_SMD is None else parts_SMD, weight_D, out_MD, M, alpha, beta, eps,
            D=D, S=0 if parts_SMD is None else parts_SMD.shape[0], BLOCK_D=block_d,
            num_warps=min(16 if M <= FEW else 8, max(1, block_d // 256)), **launch_options(x_MD.device),
        )  # fmt: skip
    return out_MD
