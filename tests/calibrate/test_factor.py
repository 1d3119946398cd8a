"""The factor of the inverse Hessian, its order and its damping, against float64."""

import numpy as np
import pytest
import torch
from golden import gptq_float64 as oracle

from minibble.calibrate.factor import DAMP_STEP, MAX_DAMP, damped, factor
from minibble.quantize.errors import CalibrationError

K = 96


def hessians(B: int = 2, tokens: int = 400, rank: int = 12) -> torch.Tensor:
    """float32 [B, K, K], not damped."""
    rng = np.random.default_rng(B)
    inputs = [oracle.correlated_inputs(rng, tokens, K, rank, noise=0.5) for _ in range(B)]
    return torch.from_numpy(np.stack([x.T @ x for x in inputs])).float()


def inverse_of(H: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(H.double()[order][:, order])


@pytest.mark.parametrize("act_order", [True, False])
def test_u_t_u_is_the_inverse(act_order: bool) -> None:
    H = damped(hessians(), 0.01)
    factored = factor(H.clone(), 0.01, act_order)
    for b in range(2):
        U, order = factored.U_BKK[b].double(), factored.order_BK[b]
        expected = inverse_of(H[b], order)
        assert float((U.T @ U - expected).abs().max() / expected.abs().max()) < 1e-5
        assert torch.equal(U, U.triu()) and bool((U.diagonal() > 0).all())
        assert sorted(order.tolist()) == list(range(K))
        ordered = H[b].diagonal()[order]
        assert torch.equal(ordered, ordered.sort(descending=True).values) or not act_order
        assert act_order or order.tolist() == list(range(K))
    assert factored.damp_B.tolist() == [0.01, 0.01]


def test_equal_columns_keep_their_order() -> None:
    """Dead inputs share one value of the diagonal: the order among them must not be chance."""
    H = torch.diag_embed(torch.tensor([[1.0, 3.0, 0.0, 0.0, 3.0, 0.0]]))
    assert factor(damped(H, 0.01), 0.01, True).order_BK.tolist() == [[1, 4, 2, 3, 5, 0]]


def test_damping_is_relative_and_revives_dead_inputs() -> None:
    H = hessians(B=1)
    H[:, 5], H[:, :, 5] = 0, 0
    ours = damped(H.clone(), 0.25)
    assert np.allclose(ours[0].double().numpy(), oracle.damped(H[0].double().numpy(), 0.25), rtol=1e-6)
    assert torch.equal(damped(torch.zeros(1, 3, 3), 0.5), 1.5 * torch.eye(3)[None])


def test_what_is_not_positive_definite_is_damped_more() -> None:
    """Only the matrix that needs it; what is reported is what its diagonal got, within the rounding of a mean."""
    H = hessians()
    mean = H[1].diagonal().mean()
    H[1] -= (torch.linalg.eigvalsh(H[1].double())[0].float() + 0.3 * mean) * torch.eye(K)
    mean = H[1].diagonal().mean()
    before = H[1].diagonal().clone()
    damped(H, 0.01)
    factored = factor(H, 0.01, True)
    assert factored.damp_B[0] == 0.01 and factored.damp_B[1] in (pytest.approx(0.1), pytest.approx(1.0))
    added = (H[1].diagonal() - before) / mean
    assert float(added.max() - added.min()) < 1e-4
    order = factored.order_BK[1]
    expected = inverse_of(H[1], order)
    U = factored.U_BKK[1].double()
    assert float((U.T @ U - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_damp_reported_is_the_damp_taken() -> None:
    """As a share of the mean of the diagonal that the Hessian came with."""
    H = torch.eye(8)[None].clone()
    H[0, 0, 1] = H[0, 1, 0] = 4.0  # eigenvalues 5 and -3
    taken = factor(damped(H, 0.01), 0.01, False).damp_B[0].item()
    assert H[0].diagonal().tolist() == pytest.approx([1 + taken] * 8, rel=1e-5)


@pytest.mark.parametrize("damp", [0.0, 0.001, 0.01, 0.1])
def test_the_limit_itself_is_allowed(damp: float) -> None:
    H = torch.eye(2)[None].clone()
    H[0, 0, 1] = H[0, 1, 0] = 50
    assert factor(damped(H, damp), damp, False).damp_B.item() == pytest.approx(MAX_DAMP)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_tokens_than_inputs(damp: float) -> None:
    """A Hessian of rank 5: with damping it factors at once, without it with what float32 needs."""
    H = damped(hessians(B=1, tokens=5, rank=5), damp)
    factored = factor(H, damp, True)
    assert factored.damp_B.item() == damp if damp else 0 <= factored.damp_B.item() < 1e-2
    assert bool(torch.isfinite(factored.U_BKK).all())


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_indefinite_without_damping(damp: float) -> None:
    H = hessians(B=1)
    H[0, 3, 4] = H[0, 4, 3] = 1.01 * H[0].diagonal()[3:5].max()
    taken = factor(damped(H, damp), damp, True).damp_B.item()
    steps = np.log(taken / (damp or 1e-6)) / np.log(DAMP_STEP)
    assert steps > 0.5 and np.isclose(steps, round(steps))


@pytest.mark.parametrize("off", [1e6, float("nan")])
def test_beyond_the_limit(off: float) -> None:
    H = torch.eye(4)[None].clone()
    H[0, 0, 1] = H[0, 1, 0] = off
    with pytest.raises(CalibrationError, match=f"not positive definite even with a damp of {MAX_DAMP:g}"):
        factor(damped(H, 0.01), 0.01, True)
