"""Decode attention: the reference against torch's in float64, the kernel against the same."""

import pytest
import torch
from golden.kernel_checks import interpreted
from torch import Tensor

from minibble.runtime.kernels import attention

# H, G, K: the released model, small ones, a head that fills no power of two.
SHAPES = [(64, 8, 128), (4, 2, 16), (3, 1, 24), (4, 4, 64)]


def inputs(
    shape: tuple[int, int, int], B: int, tokens: int, capacity: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; the caches hold NaN beyond the tokens."""
    H, G, K = shape
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(B, H, K, generator=generator).to(dtype)
    k, v = (torch.full((B, G, capacity, K), float("nan"), dtype=dtype) for _ in range(2))
    for cache in (k, v):
        cache[:, :, :tokens] = torch.randn(B, G, tokens, K, generator=generator).to(dtype)
    return q, k, v


def padding(B: int, tokens: int, capacity: int) -> Tensor:
    """Left padding of every length, up to all but the new token, and holes."""
    valid = torch.rand(B, capacity, generator=torch.Generator().manual_seed(B)) > 0.2
    for row in range(B):
        valid[row, : row * tokens // max(B - 1, 1)] = False
    return valid


def expected(q: Tensor, k: Tensor, v: Tensor, tokens: int, valid: Tensor | None) -> Tensor:
    """In float64 by torch's own attention, over the tokens alone."""
    B, H = q.shape[:2]
    mask = torch.ones(B, 1, 1, tokens, dtype=torch.bool, device=q.device)
    if valid is not None:
        mask = valid[:, None, None, :tokens].clone()
        mask[..., -1] = True
    k, v = (x[:, :, :tokens].double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q.double()[:, :, None], k, v, attn_mask=mask)
    return o[:, :, 0]


def check(
    device: torch.device, shape: tuple[int, int, int], B: int, tokens: int, capacity: int,
    masked: bool, dtype: torch.dtype, bound: float,
) -> None:  # fmt: skip
    q, k, v = inputs(shape, B, tokens, capacity, dtype)
    valid = padding(B, tokens, capacity) if masked else None
    past = torch.tensor([tokens - 1], dtype=torch.int32, device=device)
    q, k, v = (x.to(device) for x in (q, k, v))
    valid = None if valid is None else valid.to(device)
    o = attention.decode_attention(q, k, v, past, valid)
    right = expected(q, k, v, tokens, valid)
    assert o.shape == q.shape and o.dtype == dtype
    error = (o.double() - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
    assert float(error.max()) < bound, f"{shape} {B=} {tokens=} {capacity=} {masked=}: {error.tolist()}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape: tuple[int, int, int], tokens: int, masked: bool) -> None:
    for B in (1, 3):
        check(torch.device("cpu"), shape, B, tokens, 300, masked, torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B", [1, 2, 5, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda(cuda_device: torch.device, shape: tuple[int, int, int], B: int, masked: bool) -> None:
    """Lengths that fill splits, leave some empty or end within a block; capacities far beyond them."""
    for tokens, capacity in ((1, 1), (63, 64), (65, 1024), (300, 300), (1025, 1100)):
        check(cuda_device, shape, B, tokens, capacity, masked, torch.bfloat16, 5e-3)
    check(cuda_device, shape, B, 130, 500, masked, torch.float32, 1e-5)


@pytest.mark.gpu
def test_cuda_long_context(cuda_device: torch.device) -> None:
    check(cuda_device, SHAPES[0], 1, 50_001, 65_536, True, torch.bfloat16, 5e-3)


def check_interpreted() -> None:
    """The kernels on CPU tensors: the package would take the reference there. Blocks of 16 instead of 64 places."""
    from minibble.runtime.kernels.attention import fused, reference

    fused.BLOCK_L = 16
    reference.decode = fused.decode
    for shape in SHAPES[1:]:
        for B, tokens, capacity in ((1, 1, 1), (1, 40, 64), (3, 17, 100), (2, 64, 64)):
            for masked in (False, True):
                check(torch.device("cpu"), shape, B, tokens, capacity, masked, torch.float32, 1e-5)
    # One split: the first launch writes the outputs.
    check(torch.device("cpu"), SHAPES[1], 8, 20, 64, True, torch.float32, 1e-5)


def test_kernels_interpreted() -> None:
    interpreted("test_attention", "check_interpreted")
