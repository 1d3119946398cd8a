"""Lightning attention: the quick paths against the token-by-token reference. B batch, T tokens, H heads, K head dim."""

import pytest
import torch
from torch import Tensor

from minibble.runtime.kernels import compiled, lightning
from minibble.runtime.kernels.lightning import blocked, reference

H, K, EPS = 3, 16, 1e-6


def case(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(B, T, 4 * H * K, generator=generator)
    state = torch.randn(B, H, K, K, generator=generator)
    slope = torch.tensor([0.5, 0.01, 1e-5])
    return projected, slope, state, torch.rand(H * K, generator=generator) + 0.5


def expected(case: tuple[Tensor, ...], valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In float64, from the formulas."""
    projected, slope, state, norm = (x.double() for x in case)
    qkv = projected[..., : 3 * H * K] * torch.sigmoid(projected[..., : 3 * H * K])
    qkv = qkv.view(*projected.shape[:2], H, 3 * K)
    if valid is not None:
        qkv = qkv * valid[:, :, None, None]
    q, k, v = qkv.split(K, dim=-1)
    o, state = reference.lightning(q, k, v, slope, state, valid)
    o = o.flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    return o * torch.sigmoid(projected[..., 3 * H * K :]), state


def compare(ours: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], bound: float = 1e-5) -> None:
    for a, b in zip(ours, right, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert float((a.double() - b).norm() / b.norm()) < bound


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 17, 300])
@pytest.mark.parametrize("loops", [True, False], ids=["compiled", "torch"])
def test_gated(monkeypatch: pytest.MonkeyPatch, B: int, T: int, loops: bool) -> None:
    if loops and not compiled.available():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(lightning, "available", lambda: loops)
    projected, slope, state, norm = case(B, T)
    right = expected((projected, slope, state, norm))
    with torch.no_grad():
        compare(lightning.gated(projected, slope, state.clone(), norm, EPS, None), right)


def test_the_compiled_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled.available():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(lightning, "lightning", lambda *_: pytest.fail("composed of single operations instead"))
    with torch.no_grad():
        lightning.gated(*case(1, 1), EPS, None)


@pytest.mark.parametrize("T", [5, 260])
def test_padding_neither_adds_nor_decays(T: int) -> None:
    projected, slope, state, norm = case(2, T, seed=1)
    valid = torch.rand(2, T, generator=torch.Generator().manual_seed(2)) > 0.4
    right = expected((projected, slope, state, norm), valid)
    with torch.no_grad():
        o, after = lightning.gated(projected, slope, state.clone(), norm, EPS, valid)
    assert float((after.double() - right[1]).norm() / right[1].norm()) < 1e-5
    assert float((o.double() - right[0])[valid].norm() / right[0][valid].norm()) < 1e-5


def test_blocks_carry_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 7)
    projected, slope, state, norm = case(1, 40, seed=3)
    right = expected((projected, slope, state, norm))
    with torch.no_grad():
        compare(lightning.gated(projected, slope, state.clone(), norm, EPS, None), right)
