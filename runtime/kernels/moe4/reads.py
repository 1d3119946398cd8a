"""Counts of experts that steps read from the device and from host memory. P chosen, E experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.overlap import launch_options, wait


@triton.jit
def _count_kernel(p_ids, p_far, p_counts, P, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr):
    o_p = tl.arange(0, BLOCK_P)
    wait(OVERLAP)
    id_P = tl.load(p_ids + o_p, mask=o_p < P, other=-1)
    id_Q = tl.load(p_ids + o_p, mask=o_p < P, other=-1)
    before_PQ = (id_P[:, None] == id_Q[None, :]) & (o_p[:, None] > o_p[None, :])
    first_P = (o_p < P) & (tl.sum(before_PQ.to(tl.int32), axis=1) == 0)
    far_P = tl.load(p_far + id_P, mask=o_p < P, other=0).to(tl.int32)
    far = tl.sum(first_P.to(tl.int32) * far_P, axis=0)
    near = tl.sum(first_P.to(tl.int32), axis=0) - far
    tl.store(p_counts, tl.load(p_counts) + near)
    tl.store(p_counts + 1, tl.load(p_counts + 1) + far)


def count_reads(ids: Tensor, far_E: Tensor, counts: Tensor) -> None:
    """Add to `counts`, int64 [2], how many different experts are among `ids`, int32: near ones, and those whose
    `far_E`, uint8, is 1. One such launch at a time on the same counts."""
    assert ids.is_contiguous() and ids.dtype == torch.int32 and far_E.dtype == torch.uint8 and far_E.is_contiguous()
    assert counts.dtype == torch.int64 and counts.shape == (2,)
    P = ids.numel()
    with torch.cuda.device_of(ids):  # Triton launches on the current device
        _count_kernel[(1,)](
            ids, far_E, counts, P, BLOCK_P=max(2, triton.next_power_of_2(P)), num_warps=1, **launch_options(ids.device)
        )
