"""Lightning attention at the released size, from its projections to its gated output, against what it must read,
write and compute. B batch, T tokens, H heads, K head dim."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minibble.runtime.attention import LIGHTNING_NORM_EPS, geometric_slopes
from minibble.runtime.bench import gpu
from minibble.runtime.bench.check import checked, kernels
from minibble.runtime.bench.linear import Tell
from minibble.runtime.bench.weights import generator_on, random_tensor
from minibble.runtime.kernels.lightning import gated_with_factors, scaled

HEADS, HEAD_DIM = 64, 128
# Sequences and new tokens of each: decode steps, then prefills.
RUNS = ((1, 1), (8, 1), (32, 1), (1, 1024), (1, 8192))
QUICK_RUNS = ((1, 1), (1, 8192))


def measure(
    runs: Sequence[tuple[int, int]],
    device: torch.device,
    ceilings: dict[str, float],
    tell: Tell,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> dict[str, Any]:
    """Times of every run beside its floor: its bytes at the reading bandwidth or its operations at the matrix rate."""
    rows = []
    for batch, tokens in runs:
        tell(f"lightning, {batch} x {tokens} tokens")
        calls, expected = _calls(batch, tokens, heads, head_dim, device)
        error = checked(f"lightning of {batch} x {tokens} tokens", partial(_whole, calls[0]), expected)
        us = gpu.graph_us(calls)
        floor = max(
            nbytes(batch, tokens, heads, head_dim) / ceilings["read_GB_per_s"] / 1e3,
            4 * batch * tokens * heads * head_dim**2 / ceilings["bf16_TFLOP_per_s"] / 1e6,
        )
        rows.append({"batch": batch, "tokens": tokens, "us": round(us, 2), "floor_us": round(floor, 2), "error": error})
    return {"heads": heads, "head_dim": head_dim, "rows": rows}


def _whole(call: Callable[[], tuple[Tensor, Tensor | None]]) -> Tensor:
    return scaled(*call())


def nbytes(batch: int, tokens: int, heads: int, head_dim: int) -> int:
    """Bytes that must be moved: projections and output in 16 bits, the float32 state read and written."""
    activations = 2 * batch * tokens * 5 * heads * head_dim
    return activations + 2 * 4 * batch * heads * head_dim**2


def _calls(
    batch: int, tokens: int, heads: int, head_dim: int, device: torch.device
) -> tuple[list[Callable[[], tuple[Tensor, Tensor | None]]], Tensor]:
    """The same on different memory, past the L2 cache together, and what the first must give, in float32.

    What they give are outputs and what the product after them multiplies each token by.
    """
    generator = generator_on(device, 2)
    count = gpu.copies(nbytes(batch, tokens, heads, head_dim))
    shape = (batch, tokens, 4 * heads * head_dim)
    inputs = [random_tensor(shape, 1.0, device, generator) for _ in range(count)]
    states = [torch.randn(batch, heads, head_dim, head_dim, device=device, generator=generator) for _ in range(count)]
    slope = torch.tensor(geometric_slopes(heads), device=device)
    norm = torch.ones(heads * head_dim, device=device)

    def call(projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        return gated_with_factors(projected, slope, state, norm, LIGHTNING_NORM_EPS, None)[:2]

    with kernels("reference"):
        expected, _ = call(inputs[0].float(), states[0].clone())
    return [partial(call, x, state) for x, state in zip(inputs, states, strict=True)], expected
