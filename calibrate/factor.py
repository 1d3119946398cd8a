"""From a Hessian to what the column loop needs: damped, ordered, and the factor of its inverse.

H = sum over tokens of x x^T, float32 [B, K, K], of the inputs that a matrix sees (GPTQ, Frantar et al., 2023, eq. 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minibble.quantize.errors import CalibrationError

DAMP_STEP = 10.0  # each failed factorization damps this much more
MAX_DAMP = 100.0


@dataclass(frozen=True)
class Factored:
    """`U_BKK` upper triangular with H^-1 = U^T U for the columns in the order `order_BK`; `damp_B` what it took."""

    U_BKK: Tensor
    order_BK: Tensor
    damp_B: Tensor


def damped(H_BKK: Tensor, damp: float | Tensor) -> Tensor:
    """H with `damp` times its mean diagonal added to the diagonal, in place.

    Columns that were never anything but 0 get the mean diagonal: nothing is fed back from or into them.
    """
    diagonal = H_BKK.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean) + damp * mean)
    return H_BKK


def factor(H_BKK: Tensor, damp: float, act_order: bool) -> Factored:
    """Factor each H; one that is not positive definite is damped ten times as much until it is.

    `H_BKK`, already `damped` by `damp`, gets the additional damping too. Raises CalibrationError beyond MAX_DAMP.
    """
    B, K, _ = H_BKK.shape
    damp_B = torch.full((B,), damp, dtype=torch.float64)
    order_BK = torch.arange(K, device=H_BKK.device).expand(B, K)
    if act_order:
        order_BK = H_BKK.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    U_BKK = torch.empty_like(H_BKK)
    for b in range(B):
        U_BKK[b] = _upper(H_BKK[b], order_BK[b], damp_B[b])
    return Factored(U_BKK, order_BK, damp_B)


def _upper(H_KK: Tensor, order_K: Tensor, damp: Tensor) -> Tensor:
    """U = R^-1 with the ordered H = R R^T, R upper triangular: the lower factor of H turned around both ways.

    Two thirds of K^3 multiplications instead of the four thirds of inverting H and factoring the inverse.
    """
    turned = order_K.flip(0)
    diagonal = H_KK.diagonal()
    mean = diagonal.mean() / (1 + damp.item())  # before it was damped
    while True:
        L, info = torch.linalg.cholesky_ex(H_KK[turned][:, turned])
        if int(info) == 0:
            eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
            return torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1)
        before = damp.item()
        damp.fill_(float(f"{before * DAMP_STEP:.6g}") if before > 0 else 1e-6)
        if not damp <= MAX_DAMP:
            raise CalibrationError(f"a Hessian is not positive definite even with a damp of {MAX_DAMP:g}")
        diagonal += (damp.item() - before) * mean
