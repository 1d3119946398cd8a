"""The routed experts of a layer: y = sum over a token's experts of weight * down(silu(gate x) * up x)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from minibble.runtime.kernels.linear4 import Weight, gemv_arrays


class Matrix(Protocol):
    """A matrix W [N, K] that multiplies: called with x [..., K] it gives x W^T."""

    shape: tuple[int, int]

    @property
    def held(self) -> Weight: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Expert(Protocol):
    """An expert: gate above up, [2F, D], and down, [D, F]."""

    @property
    def gate_up(self) -> Matrix: ...

    @property
    def down(self) -> Matrix: ...


def moe4(x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor, experts: Sequence[Expert]) -> Tensor:
    """Outputs [N, D] in the dtype of x.

    `ids_NA` are the chosen experts, `weights_NA` their float32 router weights. Contributions are summed in float32.
    """
    if x_ND.shape[0] == 1:
        return _one_token(x_ND, [experts[index] for index in ids_NA[0].tolist()], weights_NA)
    out_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    order = ids_NA.reshape(-1).argsort(stable=True)
    tokens = order // ids_NA.shape[1]
    weights = weights_NA.reshape(-1)[order]
    counts = torch.bincount(ids_NA.reshape(-1), minlength=len(experts)).tolist()
    start = 0
    for index, count in enumerate(counts):
        if count:
            chosen_tokens = tokens[start : start + count]
            y = expert(x_ND[chosen_tokens], experts[index]).float() * weights[start : start + count, None]
            out_ND = out_ND.index_add(0, chosen_tokens, y)
            start += count
    return out_ND.to(x_ND.dtype)


def _one_token(x_ND: Tensor, chosen: list[Expert], weights_NA: Tensor) -> Tensor:
    arrays = [
        (gate_up, down)
        for one in chosen
        if (gate_up := gemv_arrays(one.gate_up.held)) and (down := gemv_arrays(one.down.held))
    ]
    if len(arrays) == len(chosen) and not x_ND.requires_grad:
        from minibble.runtime.kernels.moe4 import gemv

        y_D = gemv.experts_of_one(x_ND.float().view(-1), arrays, weights_NA[0], chosen[0].down.shape[1])
        return y_D.to(x_ND.dtype).unsqueeze(0)
    y_AD = torch.cat([expert(x_ND, one) for one in chosen])
    return torch.mm(weights_NA, y_AD.float()).to(x_ND.dtype)


def expert(x_ND: Tensor, one: Expert) -> Tensor:
    """One expert on the tokens x [N, D]."""
    return one.down(activations(x_ND, one))


def activations(x_ND: Tensor, one: Expert) -> Tensor:
    """What an expert's `down` receives, [N, F]."""
    gate, up = one.gate_up(x_ND).chunk(2, dim=-1)
    return F.silu(gate) * up
