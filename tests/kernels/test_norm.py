"""RMSNorm, alone and of a residual: every path against float64. M rows, D features, S summands."""

from itertools import product

import pytest
import torch
from golden.kernel_checks import interpreted, poisoned
from torch import Tensor

from minibble.runtime.kernels import compiled, norm

EPS = 1e-5


def right_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def right_residual(x: Tensor, parts: Tensor, alpha: float, beta: float, weight: Tensor) -> Tensor:
    return right_norm(alpha * x.double() + beta * parts.double().sum(0), weight)


def error(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right).norm() / right.norm())


@pytest.mark.parametrize("shape", [(1, 1, 96), (96,), (2, 5, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loops", [True, False], ids=["compiled", "torch"])
def test_rms_norm(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, loops: bool) -> None:
    if loops and not compiled.available():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(norm, "available", lambda: loops)
    x, weight = torch.randn(shape).to(dtype), torch.rand(96)
    with torch.no_grad():
        y = norm.rms_norm(x, weight, EPS)
    assert y.dtype == torch.float32 and y.shape == x.shape
    assert error(y, right_norm(x, weight)) < 1e-6
    assert norm.rms_norm(x, weight, EPS, torch.bfloat16).dtype == torch.bfloat16


def test_gradients_pass() -> None:
    x = torch.randn(1, 96, requires_grad=True)
    norm.rms_norm(x, torch.ones(96), EPS).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(96,), (2, 5, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_residual(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, parts, weight = torch.randn(shape).to(dtype), torch.randn(3, *shape), torch.rand(96)
    y = norm.norm_residual(x, parts, 3.5, 0.7, weight, EPS)
    assert y.dtype == dtype and y.shape == x.shape
    assert error(y, right_residual(x, parts, 3.5, 0.7, weight)) < (1e-6 if dtype == torch.float32 else 3e-3)


def check_interpreted() -> None:
    from minibble.runtime.kernels.norm.fused import norm_rows

    for M, D, S in product((1, 2, 3, 17, 65), (96, 100), (1, 3)):
        x, parts, weight = torch.randn(M, D), torch.randn(S, M, D), torch.rand(D)
        with poisoned():
            alone = norm_rows(x, None, 1.0, 0.0, weight, EPS, torch.float32)
        assert error(alone, right_norm(x, weight)) < 1e-6
        both = norm_rows(x, parts, 3.5, 0.7, weight, EPS, torch.float32)
        assert error(both, right_residual(x, parts, 3.5, 0.7, weight)) < 1e-6
    x, y, weight = torch.randn(7, 96).bfloat16(), torch.randn(1, 7, 96).bfloat16(), torch.rand(96)
    both = norm_rows(x, y, 3.5, 0.7, weight, EPS, torch.bfloat16)
    assert error(both, right_residual(x, y, 3.5, 0.7, weight)) < 5e-3  # the interpreter rounds towards zero


def test_interpreted() -> None:
    interpreted("test_norm", "check_interpreted")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [6144, 96, 1000])
@pytest.mark.parametrize("M", [1, 2, 3, 7, 16, 17, 63, 64, 65, 300, 8192])
def test_cuda(cuda_device: torch.device, M: int, D: int) -> None:
    x, weight = torch.randn(M, D, device=cuda_device).bfloat16(), torch.rand(D, device=cuda_device)
    for S, dtype in ((1, torch.bfloat16), (1, torch.float32), (4, torch.float32), (7, torch.float32)):
        parts = torch.randn(S, M, D, device=cuda_device).to(dtype)
        with poisoned():
            y = norm.norm_residual(x, parts, 3.5, 0.7, weight, EPS)
        assert y.dtype == torch.bfloat16
        assert error(y, right_residual(x, parts, 3.5, 0.7, weight)) < 2.5e-3  # rounding alone: 1.7e-3
    with poisoned():
        y = norm.rms_norm(x, weight, EPS)
    assert y.dtype == torch.float32 and error(y, right_norm(x, weight)) < 1e-6


@pytest.mark.gpu
def test_cuda_gradients_take_the_torch_path(cuda_device: torch.device) -> None:
    x = torch.randn(3, 96, device=cuda_device, requires_grad=True)
    norm.norm_residual(x, x.detach()[None], 2.0, 1.0, torch.ones(96, device=cuda_device), EPS).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
