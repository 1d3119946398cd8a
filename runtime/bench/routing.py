"""Routers with random weights that choose experts uniformly or by Zipf's law.

A router's logits are normal where its weights or its inputs are: an expert whose row is longer comes among the first
more often. How much longer is found by simulation. The hidden states of a random model are no such inputs: its tokens
resemble each other more from layer to layer, and take the same experts. So its routers are given noise, chosen by a
hash of the hidden state. Axes: L layers, E experts, N tokens, D hidden.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

SAMPLES = 20_000
ROUNDS = 200  # to within 2 % of every share
NOISE_ROWS = 1024
_STEP = 0.1  # of the logarithm of what is missing, a round: a small change of one row moves all shares
_LONGEST = 100.0  # times the middle one's; logits with a mean of 0 are never the largest more than half of the time


def zipf_shares(experts: int, active: int, exponent: float = 1.0) -> Tensor:
    """How often the expert of each rank is among the `active` chosen, float64 [E], `active` in all."""
    shares = torch.arange(1, experts + 1, dtype=torch.float64) ** -exponent
    return active * shares / shares.sum()


def ranks(layers: int, experts: int, seed: int = 0) -> Tensor:
    """The rank of each expert, int64 [L, E]: another order in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator) for _ in range(layers)])


@cache
def row_lengths(experts: int, active: int, exponent: float = 1.0) -> Tensor:
    """Standard deviation of the logit of the expert of each rank, float32 [E], so that choices follow `zipf_shares`."""
    wanted = zipf_shares(experts, active, exponent)
    normal = torch.randn(SAMPLES, experts, generator=torch.Generator().manual_seed(0))
    lengths = torch.ones(experts)
    for _ in range(ROUNDS):
        found = shares_of(lengths, normal, active)
        lengths = lengths * ((wanted + 1e-4) / (found + 1e-4)).float() ** _STEP
        lengths = (lengths / lengths.median()).clamp(max=_LONGEST)
    return lengths


def shares_of(lengths_E: Tensor, normal_NE: Tensor, active: int) -> Tensor:
    """How often each expert is among the first for logits `normal` of those standard deviations."""
    chosen = (normal_NE * lengths_E).topk(active, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=len(lengths_E)).double() / len(normal_NE)


def by_noise(route: Callable[[Tensor], Any], noise: Tensor) -> Callable[[Tensor], Any]:
    """`route`, but of a row of `noise` [NOISE_ROWS, D] for each token instead of its hidden state, bfloat16 [N, D]."""

    def routed(x_ND: Tensor) -> Any:
        bits = x_ND.contiguous().view(torch.int32)[:, 0]
        return route(noise.index_select(0, (bits * -1640531527 >> 16) & (NOISE_ROWS - 1)))  # 2^32 / golden ratio

    return routed
