"""Chooses the 4-bit codes of matrices so that their products with what they see in use change least.

The objective of a matrix W [N, K] is tr((W - Q) H (W - Q)^T), H the sum of x x^T over its inputs x. Scales are searched
and take the values they will have in the file; codes are chosen by error feedback (GPTQ, Frantar et al., 2023) in the
order of activation, with static groups; then sweeps of coordinate descent improve codes and, in between, scales.

Axes: B matrices, K columns, N rows, G groups of columns that share a scale. Several stored matrices that see the same
inputs lie row under row in one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minibble.calibrate.factor import Factored, damped, factor
from minibble.calibrate.scales import Grid, grid_for
from minibble.quantize.errors import CalibrationError
from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import join_nibbles, level_table
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.feedback import descend, feed_back, quadratic, search_scales, subtract, tf32

# Shares of the scale that just reaches a group's largest weight. Beyond 1 for int4, whose outermost level is on one
# side only: 8/7 reaches the largest weight on the other.
SHARES = tuple(0.6 + 0.0125 * step for step in range(45))
FIT_EVERY = 3  # sweeps after which the scales are fitted anew: each third one


@dataclass(frozen=True)
class SolverSettings:
    """How codes are chosen: `damp` times the mean of H's diagonal is added to it; `sweeps` of coordinate descent."""

    damp: float = 0.05
    act_order: bool = True
    sweeps: int = 6


@dataclass(frozen=True)
class Part:
    """One stored matrix, solved: its codes and scales, and how far it is from its source.

    `relative_error` is ||W - Q||^2 / ||W||^2, `output_error` the same under H; `damp` is what its factorization took.
    """

    q: QuantizedTensor
    relative_error: float
    output_error: float
    damp: float


def solve(
    W_BKN: Tensor, H_BKK: Tensor, rows: list[int], format: Format, settings: SolverSettings, dtype: torch.dtype
) -> list[list[Part]]:
    """For each of the B matrices its stored parts, of so many `rows` each; `dtype` is that of the source.

    `W_BKN` and `H_BKK`, float32 on one device, are overwritten. Raises CalibrationError if an H cannot be factored, and
    for weights beyond what the format or float32 holds.
    """
    levels = level_table(format.levels, W_BKN.device)
    with tf32(W_BKN.device):
        energy_BN, seen_BN = _energy(W_BKN), quadratic(H_BKK, W_BKN)
    if not bool(torch.isfinite(energy_BN).all() & torch.isfinite(seen_BN).all()):
        raise CalibrationError("the squares of weights or of outputs are beyond float32")
    undamped = H_BKK.diagonal(dim1=1, dim2=2).clone()
    damped(H_BKK, settings.damp)
    factored = factor(H_BKK, settings.damp, settings.act_order)
    scale_BGN = search_scales(W_BKN, levels, format.block_size, SHARES)
    grid = grid_for(format, scale_BGN, rows)
    for group in range(scale_BGN.shape[1]):
        scale_BGN[:, group] = grid.nearest(scale_BGN[:, group], group)
    with tf32(W_BKN.device):
        codes_BKN = _by_feedback(W_BKN, factored, scale_BGN, format, levels)
        subtract(W_BKN, codes_BKN, scale_BGN, levels)
        for sweep in range(settings.sweeps):
            fit = sweep > 0 and sweep % FIT_EVERY == 0
            descend(W_BKN, codes_BKN, H_BKK, scale_BGN, levels, grid.nearest if fit else None)
        H_BKK.diagonal(dim1=1, dim2=2).copy_(undamped)
        lost_BN, off_BN = _energy(W_BKN), quadratic(H_BKK, W_BKN)
    errors = torch.stack([_by_part(x, rows) for x in (lost_BN, energy_BN, off_BN, seen_BN)]).cpu()
    parts = _spans(rows)
    return [
        [
            Part(
                quantized(codes_BKN[b], scale_BGN, grid, b, span, format, dtype),
                _ratio(errors[0, b, i], errors[1, b, i]),
                _ratio(errors[2, b, i], errors[3, b, i]),
                factored.damp_B[b].item(),
            )
            for i, span in enumerate(parts)
        ]
        for b in range(len(W_BKN))
    ]


def _by_feedback(W_BKN: Tensor, factored: Factored, scale_BGN: Tensor, format: Format, levels: Tensor) -> Tensor:
    """Codes in the columns' own order, chosen in that of `factored`."""
    ordered, codes_BKN = torch.empty_like(W_BKN), torch.empty_like(W_BKN, dtype=torch.uint8)
    for b, order in enumerate(factored.order_BK):
        torch.index_select(W_BKN[b], 0, order, out=ordered[b])
    chosen = feed_back(ordered, factored.U_BKK, scale_BGN, factored.order_BK // format.block_size, levels)
    for b, order in enumerate(factored.order_BK):
        codes_BKN[b].index_copy_(0, order, chosen[b])
    return codes_BKN


def quantized(
    codes_KN: Tensor, scale_BGN: Tensor, grid: Grid, b: int, rows: slice, format: Format, dtype: torch.dtype
) -> QuantizedTensor:
    """The rows of matrix b as they are stored."""
    own = codes_KN[:, rows].t().contiguous()
    codes = join_nibbles(own.reshape(-1))
    absmax, nested, offset = grid.stored(scale_BGN, b, rows)
    return QuantizedTensor(
        (own.shape[0], own.shape[1]), codes, absmax, nested, offset, format.block_size, dtype, format.levels
    )


def _energy(X_BKN: Tensor) -> Tensor:
    """Sum of squares of every column, [B, N]."""
    return torch.linalg.vector_norm(X_BKN, dim=1).square()


def _spans(rows: list[int]) -> list[slice]:
    ends = torch.tensor(rows).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]


def _by_part(x_BN: Tensor, rows: list[int]) -> Tensor:
    """Sums over the rows of each part, float64 [B, parts]."""
    return torch.stack([part.double().sum(dim=1) for part in x_BN.split(rows, dim=1)], dim=1)


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Rounded to 6 digits, so that the order of summation hardly shows in files; 0 of nothing."""
    return float(f"{max(part.item(), 0.0) / whole.item():.6g}") if whole > 0 else 0.0
