"""The choice of experts: every path against a float64 product and a sort. M tokens, D hidden, E experts, A active."""

from itertools import product

import pytest
import torch
from golden.kernel_checks import interpreted, poisoned
from torch import Tensor

from minibble.runtime.kernels import router
from minibble.runtime.kernels.router import reference


def case(M: int, D: int, E: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Logits lie at least 1e-3 apart, but those of experts 1 and 3, which are equal."""
    generator = torch.Generator().manual_seed(M + D + E)
    for _ in range(200):
        y, weight = torch.randn(M, D, generator=generator).bfloat16(), torch.randn(E, D, generator=generator)
        logits = (y.double() @ weight.double().t()).sort(dim=-1).values
        if float(logits.diff(dim=-1).min()) > 1e-3 or M * E > 300:
            break
    weight[3] = weight[1]
    return y.to(device), weight.to(device)


def compare(ours: tuple[Tensor, Tensor], y: Tensor, weight: Tensor, active: int) -> None:
    """Weights close; ids those of the largest logits, to float32, in order, of equals the lowest first."""
    ids, shares = ours
    logits = y.double() @ weight.double().t()
    right_ids, right_shares = reference.choose(logits, active)
    assert ids.dtype == torch.int32 and shares.dtype == torch.float32 and ids.shape == shares.shape
    assert float((shares.double() - right_shares).abs().max()) < 1e-4
    differs = ids != right_ids
    gap = logits.gather(1, ids.long()) - logits.gather(1, right_ids.long())
    assert float(gap.abs().max()) < 1e-4 * float(logits.abs().max())
    assert float(differs.float().mean()) < 1e-3
    both = ((ids == 1) | (ids == 3)).sum(dim=1) == 2
    first = (ids == 1).int().argmax(dim=1) < (ids == 3).int().argmax(dim=1)
    assert bool(first[both].all()) and not bool(((ids == 3).any(1) & ~(ids == 1).any(1)).any())


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize(("E", "active"), [(4, 2), (8, 4), (5, 5)])
def test_torch(M: int, E: int, active: int) -> None:
    y, weight = case(M, 96, E)
    compare(router.route(y, weight, active), y, weight, active)


def test_renormalised_softmax() -> None:
    """The definition: a softmax over all experts, the largest of it made to sum to 1."""
    y, weight = case(5, 96, 8)
    shares, ids = (y.float() @ weight.t()).softmax(-1).topk(2)
    ours = router.route(y, weight, 2)
    assert torch.allclose(ours[1], shares / shares.sum(-1, keepdim=True), atol=1e-6)
    assert (ours[0] == ids).float().mean() > 0.5  # of equals topk may take either


def test_gradients_pass() -> None:
    y = torch.randn(2, 96, requires_grad=True)
    router.route(y, torch.randn(4, 96), 2)[1][:, 0].sum().backward()
    assert y.grad is not None and y.grad.isfinite().all()


def check_interpreted() -> None:
    from minibble.runtime.kernels.router import fused

    fused.STRETCH = 64
    for M, D, (E, active) in product((1, 2, 3, 17), (96, 100), ((32, 2), (5, 3), (4, 4))):
        y, weight = case(M, D, E)
        with poisoned():
            ours = fused.route(y, weight, active)
        compare(ours, y, weight, active)
    y, weight = case(300, 96, 5)
    compare(fused.route(y, weight, 2), y, weight, 2)
    y, weight = case(2, 96, 4)
    y[1] = float("nan")
    ids, shares = fused.route(y, weight, 2)
    assert bool((ids >= 0).all()) and bool((ids < 4).all()) and bool(shares[1].isnan().all())
    compare((ids[:1], shares[:1]), y[:1], weight, 2)


def test_interpreted() -> None:
    interpreted("test_router", "check_interpreted")


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "E", "active"), [(6144, 32, 2), (1000, 32, 2), (96, 5, 3), (2048, 64, 8)])
@pytest.mark.parametrize("M", [1, 2, 3, 7, 16, 17, 63, 64, 65, 300, 512, 4096])
def test_cuda(cuda_device: torch.device, M: int, D: int, E: int, active: int) -> None:
    y, weight = case(M, D, E, cuda_device)
    for _ in range(2):  # the first launch leaves the counters as it found them
        with poisoned():
            ours = router.route(y, weight, active)
        compare(ours, y, weight, active)


@pytest.mark.gpu
def test_cuda_graph(cuda_device: torch.device) -> None:
    y, weight = case(3, 6144, 32, cuda_device)
    router.route(y, weight, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = router.route(y, weight, 2)
    for seed in range(3):
        y.copy_(torch.randn(3, 6144, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        compare(ours, y, weight, 2)
