"""RMSNorm: both paths against float64."""

import pytest
import torch

from minibble.runtime.kernels import compiled, norm


@pytest.mark.parametrize("shape", [(1, 1, 96), (96,), (2, 5, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loops", [True, False], ids=["compiled", "torch"])
def test_rms_norm(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, loops: bool) -> None:
    if loops and not compiled.available():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(norm, "available", lambda: loops)
    x, weight = torch.randn(shape).to(dtype), torch.rand(96)
    right = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    with torch.no_grad():
        y = norm.rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.float32 and y.shape == x.shape
    assert float((y.double() - right).norm() / right.norm()) < 1e-6


def test_gradients_pass() -> None:
    x = torch.randn(1, 96, requires_grad=True)
    norm.rms_norm(x, torch.ones(96), 1e-5).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
