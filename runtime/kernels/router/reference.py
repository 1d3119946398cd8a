"""The choice of experts in plain torch."""

import torch
from torch import Tensor


def route(y_MD: Tensor, weight_ED: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """See `minibble.runtime.kernels.router.route`; in float32, or float64 where both are."""
    wide = weight_ED.dtype if weight_ED.dtype == torch.float64 else torch.float32
    return choose(y_MD.to(wide) @ weight_ED.to(wide).t(), active)


def choose(logits_ME: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """The `active` largest logits, of equals that of the lowest expert first, and their softmax."""
    # A stable sort: which of two equals topk takes is nowhere promised, and differs on CUDA.
    logits, ids = logits_ME.sort(dim=-1, descending=True, stable=True)
    return ids[:, :active].to(torch.int32), logits[:, :active].softmax(dim=-1)
