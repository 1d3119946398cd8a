"""Rotary embedding and append to the cache: the reference against float64, the kernels against the reference."""

import pytest
import torch
from golden.kernel_checks import interpreted
from torch import Tensor

from minibble.runtime.kernels import rope_cache

# H, G, K, R (rotated pairs): the released model, whole heads rotated, none, sizes that fill no power of two.
SHAPES = [(64, 8, 128, 32), (4, 2, 16, 8), (2, 1, 16, 0), (3, 1, 24, 5)]
FAR = 1_000_003


def frequencies(R: int) -> Tensor:
    return 1e7 ** (-torch.arange(0, 2 * R, 2, dtype=torch.float64) / max(2 * R, 1))


def inputs(shape: tuple[int, int, int, int], B: int, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `in_proj` gives, and positions: small, different, one beyond a million."""
    H, G, K, _ = shape
    p_BTP = torch.randn(B, T, (H + 2 * G) * K, generator=torch.Generator().manual_seed(B)).to(dtype)
    return p_BTP, torch.tensor([FAR, 0, 7, 31_234, 2][:B])[:, None] + torch.arange(T)


def expected(p_BTP: Tensor, positions: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, K] and k, v [B, G, T, K] in float64, turned as complex numbers."""
    H, G, K, R = shape
    heads = p_BTP.double().view(*p_BTP.shape[:2], H + 2 * G, K).clone()
    turn = torch.polar(torch.ones(*positions.shape, R).double(), positions.double()[..., None] * frequencies(R))
    pairs = torch.complex(heads[..., : H + G, :R], heads[..., : H + G, R : 2 * R]) * turn[:, :, None]
    heads[..., : H + G, :R], heads[..., : H + G, R : 2 * R] = pairs.real, pairs.imag
    q, k, v = heads.split((H, G, G), dim=2)
    return q, k.transpose(1, 2), v.transpose(1, 2)


def check(
    device: torch.device, shape: tuple[int, int, int, int], B: int, T: int, dtype: torch.dtype, bound: float
) -> None:
    """Everything through the package; the caches are poisoned, and only the new places may be written."""
    _, G, K, R = shape
    p_BTP, positions = inputs(shape, B, T, dtype)
    right = expected(p_BTP, positions, shape)
    past = torch.tensor([5], dtype=torch.int32, device=device)
    k, v = (torch.full((B, G, T + 8, K), float("nan"), dtype=dtype, device=device) for _ in range(2))
    cos, sin = rope_cache.angles(positions.to(device), frequencies(R).to(device))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (B, T, R)
    q = rope_cache.rope_cache(p_BTP.to(device), cos, sin, k, v, past)
    new = slice(5, 5 + T)
    for ours, theirs in zip((q, k[:, :, new], v[:, :, new]), right, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert float((ours.cpu().double() - theirs).norm() / theirs.norm()) < bound
    for cache in (k, v):
        assert cache[:, :, :5].isnan().all() and cache[:, :, 5 + T :].isnan().all()


def check_end_of_cache(device: torch.device) -> None:
    """Of three tokens two have places: the third is not written, to the next sequence least of all."""
    p_BTP, positions = inputs(SHAPES[1], 2, 3, torch.float32)
    cos, sin = rope_cache.angles(positions.to(device), frequencies(8).to(device))
    k, v = (torch.full((2, 2, 6, 16), float("nan"), device=device) for _ in range(2))
    rope_cache.rope_cache(p_BTP.to(device), cos, sin, k, v, torch.tensor([4], dtype=torch.int32, device=device))
    for cache, theirs in zip((k, v), expected(p_BTP, positions, SHAPES[1])[1:], strict=True):
        assert cache[:, :, :4].isnan().all()
        assert torch.allclose(cache[:, :, 4:].cpu().double(), theirs[:, :, :2], atol=1e-5)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 1), (5, 1), (1, 7), (3, 2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_reference(shape: tuple[int, int, int, int], B: int, T: int, dtype: torch.dtype, bound: float) -> None:
    check(torch.device("cpu"), shape, B, T, dtype, bound)


def test_float32_angles_would_not_do() -> None:
    """At a million tokens the fastest pair would be off by more than bfloat16's rounding."""
    cos, _ = rope_cache.angles(torch.tensor([FAR]), frequencies(32))
    rounded = (torch.tensor([FAR], dtype=torch.float32)[:, None] * frequencies(32).float()).cos()
    assert (cos - rounded).abs().max() > 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 1), (5, 1), (1, 300), (3, 17)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_cuda(
    cuda_device: torch.device, shape: tuple[int, int, int, int], B: int, T: int, dtype: torch.dtype, bound: float
) -> None:
    check(cuda_device, shape, B, T, dtype, bound)


@pytest.mark.gpu
def test_cuda_end_of_cache(cuda_device: torch.device) -> None:
    check_end_of_cache(cuda_device)


def check_interpreted() -> None:
    """The kernels on CPU tensors: the package would take the reference there."""
    from minibble.runtime.kernels.rope_cache import fused, reference

    reference.angles = fused.angles
    reference.rope_cache = fused.rope_cache
    for shape in SHAPES[1:]:
        for B, T in ((1, 1), (3, 1), (2, 3)):
            check(torch.device("cpu"), shape, B, T, torch.float32, 1e-6)
    check_end_of_cache(torch.device("cpu"))


def test_kernels_interpreted() -> None:
    interpreted("test_rope_cache", "check_interpreted")
