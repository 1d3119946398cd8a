"""Choosing 4-bit codes so that a product keeps its output: scale search, error feedback, coordinate descent.

The objective of a matrix W is tr((W - Q) H (W - Q)^T). Its rows are independent, its columns a sequence: they go
through in blocks, inside a block one kernel (Triton on CUDA, torch on CPUs), between blocks one matrix product.

Everything is laid out column after column, so that one column of all rows lies together. Axes: B matrices, K columns,
C columns of a block, N rows, G groups of columns that share a scale. `levels` are the 16 values of a code times its
scale, float32, ascending.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from minibble.runtime.kernels import reference_forced

BLOCK = 128  # columns a kernel takes at once; group sizes divide it


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0, under which all levels are one."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def subtract(W_BKN: Tensor, codes_BKN: Tensor, scale_BGN: Tensor, levels: Tensor) -> None:
    """W - Q in the place of W, float32 [B, K, N], a block at a time."""
    group_size = W_BKN.shape[1] // scale_BGN.shape[1]
    for part in blocks(W_BKN.shape[1]):
        groups = slice(part.start // group_size, part.stop // group_size)
        scale = scale_BGN[:, groups].repeat_interleave(group_size, dim=1)
        W_BKN[:, part] -= levels[codes_BKN[:, part].int()] * scale


def quadratic(H_BKK: Tensor, X_BKN: Tensor) -> Tensor:
    """x^T H x of every column x of X, float32 [B, N]."""
    total = X_BKN.new_zeros(X_BKN.shape[0], X_BKN.shape[2])
    for part in blocks(X_BKN.shape[1]):
        total += (torch.bmm(H_BKK[:, part], X_BKN) * X_BKN[:, part]).sum(dim=1)
    return total


def search_scales(W_BKN: Tensor, levels: Tensor, group_size: int, shares: tuple[float, ...]) -> Tensor:
    """For each group of each row the scale with the least square error of rounding, float32 [B, G, N].

    Tried are `shares` of the scale that puts the group's largest magnitude on the outermost level.
    """
    return _kernels(W_BKN.device).search_scales(W_BKN, levels, group_size, shares)


def feed_back(W_BKN: Tensor, U_BKK: Tensor, scale_BGN: Tensor, group_BK: Tensor, levels: Tensor) -> Tensor:
    """Codes, uint8 [B, K, N], by error feedback in the order of the columns; `W_BKN`, float32, is overwritten.

    `U_BKK` is the upper triangular factor of the inverse Hessian, H^-1 = U^T U; `group_BK` the group of each column,
    int64. Source: GPTQ (Frantar et al., 2023), section 3.3.
    """
    codes_BKN = torch.empty(W_BKN.shape, dtype=torch.uint8, device=W_BKN.device)
    step_block = _kernels(W_BKN.device).step_block
    for part in blocks(W_BKN.shape[1]):
        step_BCN = step_block(
            W_BKN[:, part], U_BKK[:, part, part].mT.contiguous(), scale_BGN, group_BK[:, part], levels,
            codes_BKN[:, part], None,
        )  # fmt: skip
        if part.stop < W_BKN.shape[1]:
            W_BKN[:, part.stop :].baddbmm_(U_BKK[:, part, part.stop :].mT, step_BCN, alpha=-1)
    return codes_BKN


def descend(
    E_BKN: Tensor,
    codes_BKN: Tensor,
    H_BKK: Tensor,
    scale_BGN: Tensor,
    levels: Tensor,
    fit: Callable[[Tensor, int], Tensor] | None = None,
) -> None:
    """One sweep of coordinate descent over all codes, in place; the objective never rises.

    `E_BKN` = W - Q, float32, follows the codes. With `fit` the scale of each group is chosen anew first, by least
    squares: it turns the wished scale [B, N] of a group into the nearest that can be stored.
    """
    step_block = _kernels(E_BKN.device).step_block
    group_BK = torch.arange(E_BKN.shape[1], device=E_BKN.device) // (E_BKN.shape[1] // scale_BGN.shape[1])
    group_BK = group_BK.expand(E_BKN.shape[0], -1).contiguous()
    for part in blocks(E_BKN.shape[1]):
        gradient_BCN = torch.bmm(H_BKK[:, part], E_BKN)
        if fit is not None:
            _fit_scales(gradient_BCN, E_BKN, codes_BKN, H_BKK, scale_BGN, levels, fit, part)
        step_block(
            gradient_BCN, H_BKK[:, part, part].contiguous(), scale_BGN, group_BK[:, part], levels,
            codes_BKN[:, part], E_BKN[:, part],
        )  # fmt: skip


def _fit_scales(
    gradient_BCN: Tensor, E_BKN: Tensor, codes_BKN: Tensor, H_BKK: Tensor, scale_BGN: Tensor, levels: Tensor,
    fit: Callable[[Tensor, int], Tensor], part: slice,
) -> None:  # fmt: skip
    """Give each group of the block the scale that is best for its codes; E and the block's gradient follow."""
    group_size = E_BKN.shape[1] // scale_BGN.shape[1]
    for start in range(part.start, part.stop, group_size):
        columns = slice(start, start + group_size)
        local = slice(start - part.start, columns.stop - part.start)
        unit = levels[codes_BKN[:, columns].int()]
        slope = (gradient_BCN[:, local] * unit).sum(1)
        curvature = (torch.bmm(H_BKK[:, columns, columns], unit) * unit).sum(1)
        scale = scale_BGN[:, start // group_size]
        fitted = fit(scale + torch.where(curvature > 0, slope / curvature, 0.0), start // group_size)
        step = (fitted - scale)[:, None] * unit
        scale_BGN[:, start // group_size] = fitted
        E_BKN[:, columns] -= step
        gradient_BCN.baddbmm_(H_BKK[:, part, columns], step, alpha=-1)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """On CUDA, products of float32 matrices go through the matrix units, with inputs of 11 bits, while it lasts."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def blocks(K: int) -> Iterator[slice]:
    """The columns, BLOCK at a time."""
    return (slice(start, min(start + BLOCK, K)) for start in range(0, K, BLOCK))


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda" and not reference_forced():
        from minibble.runtime.kernels.feedback import columns

        return columns
    from minibble.runtime.kernels.feedback import stepwise

    return stepwise
