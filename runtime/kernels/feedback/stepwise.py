"""The kernels of this package in plain torch, for CPUs: one column at a time, all rows at once."""

import torch
from torch import Tensor

from minibble.quantize.nf4_math import nearest_levels
from minibble.runtime.kernels.feedback import inverse


def step_block(
    X_BCN: Tensor, M_BCC: Tensor, scale_BGN: Tensor, group_BC: Tensor, levels: Tensor, codes_BCN: Tensor,
    E_BCN: Tensor | None,
) -> Tensor:  # fmt: skip
    """Choose the codes of a block's columns one after the other; returns the step that each one took, [B, C, N].

    Column j sees x_j = X_j - sum over i < j of M_ji step_i. Without E: x_j is the weight as earlier errors have left
    it, the code the nearest to it, the step its error over M_jj. With E = W - Q: x_j is the gradient, the code the
    nearest to the least of the parabola along q_j, the step how far q_j moves; E follows.
    """
    step_BCN = torch.empty(X_BCN.shape, device=X_BCN.device)
    for j in range(X_BCN.shape[1]):
        group = group_BC[:, j, None, None].expand(-1, 1, X_BCN.shape[2])
        scale = scale_BGN.gather(1, group).squeeze(1)
        x = X_BCN[:, j] - torch.bmm(M_BCC[:, j : j + 1, :j], step_BCN[:, :j]).squeeze(1)
        pivot = M_BCC[:, j, j, None]
        old = None if E_BCN is None else levels[codes_BCN[:, j].int()] * scale
        target = x if old is None else old + x / pivot
        codes_BCN[:, j] = nearest_levels(target * inverse(scale), levels)
        new = levels[codes_BCN[:, j].int()] * scale
        step_BCN[:, j] = (x - new) / pivot if old is None else new - old
    if E_BCN is not None:
        E_BCN -= step_BCN
    return step_BCN


def search_scales(W_BKN: Tensor, levels: Tensor, group_size: int, shares: tuple[float, ...]) -> Tensor:
    """See `feedback.search_scales`."""
    W = W_BKN.unflatten(1, (-1, group_size))
    whole = W.abs().amax(2) / levels.abs().max()
    best, scale = torch.full_like(whole, float("inf")), whole.clone()
    for share in shares:
        tried = whole * share
        rounded = levels[nearest_levels(W * inverse(tried)[:, :, None], levels).int()] * tried[:, :, None]
        error = (W - rounded).square().sum(2)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale
