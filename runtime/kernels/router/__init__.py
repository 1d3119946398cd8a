"""The router: float32 logits, the A most probable experts of a token, their probabilities made to sum to 1.

A softmax over all experts, its A largest made to sum to 1, is the softmax over those A. Axes: M tokens, D hidden, E
experts, A active.
"""

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced
from minibble.runtime.kernels.router import reference

FEW = (
    512  # tokens; up to here quicker than a library's product and sort, 33 us against 50 (8192: 439 against 320, H100)
)


def route(y_MD: Tensor, weight_ED: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """The chosen experts, int32 [M, A], most probable first, and their weights, float32 [M, A].

    y of any float dtype, `weight_ED` float32. Of experts with equal logits the lowest comes first.
    """
    M, D = y_MD.shape
    E = weight_ED.shape[0]
    assert weight_ED.shape == (E, D) and 0 < active <= E
    needs_grad = torch.is_grad_enabled() and (y_MD.requires_grad or weight_ED.requires_grad)
    if y_MD.is_cuda and 0 < M <= FEW and weight_ED.dtype == torch.float32 and not needs_grad and not reference_forced():
        from minibble.runtime.kernels.router.fused import route as fused

        return fused(y_MD.contiguous(), weight_ED.contiguous(), active)
    return reference.route(y_MD, weight_ED, active)
