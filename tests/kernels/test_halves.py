"""Rows of activations as float16. M tokens, P rows made, K columns."""

from itertools import product

import pytest
import torch
from golden.kernel_checks import interpreted, poisoned
from torch import Tensor

from minibble.runtime.kernels.tiles import HALF_SCALE


def check(device: str) -> None:
    """Numbers come back to the bit, from the smallest rows to the largest; places and weights are kept."""
    from minibble.runtime.kernels.linear4.halves import half_rows

    for M, K in product((1, 3, 65), (96, 100, 1024)):
        x = rows(M, K).to(device)
        with poisoned():
            made, factors = half_rows(x.clone())
        assert made.dtype == torch.float16 and factors.dtype == torch.float32
        assert torch.equal(restored(made, factors), x.double())
        assert float(made.abs().amax(1).min()) >= 2**14 and float(made.abs().max()) < 2**15
        chosen, weights = torch.randint(0, M, (2 * M + 1,), device=device), torch.rand(2 * M + 1, device=device)
        made, factors = half_rows(x, chosen, weights)
        wanted = x[chosen].double() * weights.double()[:, None]
        assert float((restored(made, factors) - wanted).norm() / wanted.norm()) < 1e-6
    assert half_rows(x[:0])[0].shape == (0, K)


def check_numbers(device: str) -> None:
    """A row of zeros, smallest numbers beside the largest, and what is no number."""
    from minibble.runtime.kernels.linear4.halves import half_rows

    x = torch.zeros(4, 32)
    x[1, 0], x[1, 1], x[1, 2] = 1.0, 2**-27, 2**-45
    x[2, 3], x[3, 4] = float("inf"), float("nan")
    made, factors = half_rows(x.bfloat16().to(device))
    y = restored(made, factors).cpu()
    assert not y[0].any() and y[1, :3].tolist() == [1.0, 2**-27, 0.0]
    assert y[2, 3] == float("inf") and y[3, 4].isnan()


def rows(M: int, K: int) -> Tensor:
    """Rows of very different sizes, none of whose numbers is below 2^-20 of the largest."""
    generator = torch.Generator().manual_seed(M * K)
    x = torch.rand(M, K, generator=generator) + 2**-10
    return (x * torch.exp2(torch.linspace(-80, 80, M))[:, None] * (-1) ** torch.arange(K)).bfloat16()


def restored(made: Tensor, factors: Tensor) -> Tensor:
    return made.double() * factors.double()[:, None] * HALF_SCALE


def check_interpreted() -> None:
    check("cpu")
    check_numbers("cpu")


def test_interpreted() -> None:
    interpreted("test_halves", "check_interpreted")


@pytest.mark.gpu
def test_cuda(cuda_device: torch.device) -> None:
    check("cuda")
    check_numbers("cuda")
