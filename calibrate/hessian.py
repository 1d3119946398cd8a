"""The Hessians of matrices' output errors: for each the sum of x x^T over what the matrix receives."""

import torch
from torch import Tensor


class Hessians:
    """`sum_BKK`, float32, and how many inputs each has seen: GPTQ (Frantar et al., 2023), eq. 1, without factor 2."""

    def __init__(self, count: int, K: int, device: torch.device):
        self.sum_BKK = torch.zeros(count, K, K, device=device)
        self.tokens = [0] * count

    def add(self, b: int, x_NK: Tensor, weights_N: Tensor | None = None) -> None:
        """Add the rows of `x_NK`, each times its weight, to Hessian b.

        On CUDA 16-bit inputs go through the matrix units and sum up in float32.
        """
        if weights_N is not None:
            x_NK = x_NK * weights_N[:, None].to(x_NK.dtype)
        self._add(b, x_NK, 1.0)
        self.tokens[b] += len(x_NK)

    def add_prior(self, b: int, x_NK: Tensor, tokens: float) -> None:
        """Add the rows of `x_NK` to Hessian b so that together they count as much as `tokens` rows."""
        self._add(b, x_NK, tokens / len(x_NK))

    def first_broken(self) -> int | None:
        """The first that has seen NaN or infinity, which reach the diagonal; None if there is none."""
        broken = ~torch.isfinite(self.sum_BKK.diagonal(dim1=1, dim2=2)).all(dim=1)
        return next((b for b, is_broken in enumerate(broken.tolist()) if is_broken), None)

    def _add(self, b: int, x_NK: Tensor, alpha: float) -> None:
        H_KK = self.sum_BKK[b]
        if x_NK.is_cuda and x_NK.dtype != torch.float32:
            H_KK.add_(torch.mm(x_NK.t(), x_NK, out_dtype=torch.float32), alpha=alpha)
        else:
            H_KK.addmm_(x_NK.t().float(), x_NK.float(), alpha=alpha)
