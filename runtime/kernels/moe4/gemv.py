"""The experts of one token on CPUs that multiply with the compiled loop of linear4: an expert is one call."""

import numpy as np
import torch
from torch import Tensor

from minibble.runtime.kernels.compiled import compiled
from minibble.runtime.kernels.linear4 import gemv
from minibble.runtime.kernels.linear4.gemv import Arrays


def experts_of_one(x_D: Tensor, chosen: list[tuple[Arrays, Arrays]], weights_A: Tensor, F: int) -> Tensor:
    """sum of weight * down(silu(gate x) * up x), float32 [D].

    `x_D` is float32 [D], `weights_A` float32 [A]; of each expert come the arrays of gate above up and of down, which
    have the same levels.
    """
    y_AD, x = torch.empty(len(chosen), x_D.shape[0]), x_D.numpy()
    hidden, y = np.empty(2 * F, dtype=np.float32), y_AD.numpy()
    for index, (gate_up, down) in enumerate(chosen):
        _expert(*gate_up, down.codes, down.scales, x, hidden, y[index])
    return torch.mv(y_AD.t(), weights_A)


_rows = compiled(gemv.rows)


@compiled
def _expert(gu_codes, gu_scales, high, low, d_codes, d_scales, x, hidden, y):  # type: ignore[no-untyped-def]
    F = hidden.size // 2
    _rows(gu_codes, gu_scales, high, low, x, hidden, 0, 2 * F)
    for f in range(F):
        gate = hidden[f]
        hidden[f] = gate / (np.float32(1) + np.exp(-gate)) * hidden[F + f]
    _rows(d_codes, d_scales, high, low, hidden[:F], y, 0, y.size)
