"""Rotary embedding and append to the cache: the reference against float64, the kernels against the reference."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minibble.runtime.kernels import rope_cache

# H, G, K, R (rotated pairs): the released model, whole heads rotated, none, sizes that fill no power of two.
SHAPES = [(64, 8, 128, 32), (4, 2, 16, 8), (2, 1, 16, 0), (3, 1, 24, 5)]
FAR = 1_000_003


def frequencies(R: int) -> Tensor:
    return 1e7 ** (-torch.arange(0, 2 * R, 2, dtype=torch.float64) / max(2 * R, 1))


def inputs(shape: tuple[int, int, int, int], B: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `in_proj` gives, and positions: small, different, one beyond a million."""
    H, G, K, _ = shape
    p_BP = torch.randn(B, (H + 2 * G) * K, generator=torch.Generator().manual_seed(B)).to(dtype)
    return p_BP, torch.tensor([FAR, 0, 7, 31_234, 2][:B])


def expected(p_BP: Tensor, positions: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64, turned as complex numbers."""
    H, G, _, R = shape
    heads = p_BP.double().view(p_BP.shape[0], H + 2 * G, -1).clone()
    turn = torch.polar(torch.ones(len(positions), R).double(), positions.double()[:, None] * frequencies(R))
    pairs = torch.complex(heads[:, : H + G, :R], heads[:, : H + G, R : 2 * R]) * turn[:, None]
    heads[:, : H + G, :R], heads[:, : H + G, R : 2 * R] = pairs.real, pairs.imag
    return heads[:, :H], heads[:, H : H + G], heads[:, H + G :]


def check(device: torch.device, shape: tuple[int, int, int, int], B: int, dtype: torch.dtype, bound: float) -> None:
    """Everything through the package; the caches are poisoned, and only the new places may be written."""
    _, G, K, R = shape
    p_BP, positions = inputs(shape, B, dtype)
    right = expected(p_BP, positions, shape)
    past = torch.tensor([5], dtype=torch.int32, device=device)
    k, v = (torch.full((B, G, 9, K), float("nan"), dtype=dtype, device=device) for _ in range(2))
    cos, sin = rope_cache.angles(positions.to(device), frequencies(R).to(device))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (B, R)
    q = rope_cache.rope_cache(p_BP.to(device), cos, sin, k, v, past)
    for ours, theirs in zip((q, k[:, :, 5], v[:, :, 5]), right, strict=True):
        assert ours.dtype == dtype
        assert float((ours.cpu().double() - theirs).norm() / theirs.norm()) < bound
    for cache in (k, v):
        assert cache[:, :, :5].isnan().all() and cache[:, :, 6:].isnan().all()
    rope_cache.rope_cache(p_BP.to(device), cos, sin, k[:, :, :5].contiguous(), v[:, :, :5].contiguous(), past)


@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_reference(shape: tuple[int, int, int, int], B: int, dtype: torch.dtype, bound: float) -> None:
    p_BP, positions = inputs(shape, B, dtype)
    _, G, K, R = shape
    k, v = (torch.full((B, G, 9, K), float("nan"), dtype=dtype) for _ in range(2))
    cos, sin = rope_cache.angles(positions, frequencies(R))
    q = rope_cache.rope_cache(p_BP, cos, sin, k, v, torch.tensor([5], dtype=torch.int32))
    for ours, theirs in zip((q, k[:, :, 5], v[:, :, 5]), expected(p_BP, positions, shape), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < bound
    assert k[:, :, :5].isnan().all() and v[:, :, 6:].isnan().all()


def test_angles_of_the_model_are_these() -> None:
    """What the kernel turns by is what prefill turns by."""
    from minibble.quantize.builtin import builtin_config
    from minibble.runtime.attention import frequencies as of_config
    from minibble.runtime.attention import rotations

    config = builtin_config("minimax-text-01")
    positions = torch.tensor([[0, 1, 65_537, FAR]])
    cos, sin = rope_cache.angles(positions[0], of_config(config, positions.device))
    for ours, theirs in zip((cos, sin), rotations(config, positions), strict=True):
        assert torch.equal(torch.cat((ours, ours), dim=-1)[None], theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_cuda(
    cuda_device: torch.device, shape: tuple[int, int, int, int], B: int, dtype: torch.dtype, bound: float
) -> None:
    check(cuda_device, shape, B, dtype, bound)


def check_interpreted() -> None:
    """The kernels on CPU tensors: the package would take the reference there."""
    from minibble.runtime.kernels.rope_cache import fused, reference

    reference.angles = fused.angles
    reference.rope_cache = fused.rope_cache
    for shape in SHAPES[1:]:
        for B in (1, 3):
            check(torch.device("cpu"), shape, B, torch.float32, 1e-6)


def test_kernels_interpreted() -> None:
    """Through Triton's interpreter, which must be chosen before triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    program = "import test_rope_cache\ntest_rope_cache.check_interpreted()\n"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
