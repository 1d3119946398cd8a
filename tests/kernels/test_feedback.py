"""Scale search, error feedback and coordinate descent: both paths against float64 loops. B matrices, N rows, K columns.

The kernels get the oracle's own factor and scales, so what is compared here is the column loop alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from golden import gptq_float64 as oracle
from golden.kernel_checks import interpreted
from torch import Tensor

from minibble.quantize.nf4_math import level_table, nearest_levels
from minibble.quantize.tensors import Levels
from minibble.runtime.kernels import feedback

SHARES = (0.7, 0.8, 0.9, 1.0, 1.1)
KINDS: tuple[Levels, ...] = ("nf4", "int4")


@dataclass(frozen=True)
class Problem:
    """Matrices, damped Hessians and scales, float64 [B, N, K], [B, K, K], [B, N, G]: all exact in float32."""

    W: oracle.Array
    H: oracle.Array
    scales: oracle.Array
    levels: oracle.Array
    group: int

    @property
    def group_of(self) -> np.ndarray:
        return np.arange(self.W.shape[2]) // self.group

    def columns(self, b: int, codes: Tensor) -> np.ndarray:
        """Codes uint8 [B, K, N] of matrix b as the oracle has them."""
        return codes[b].t().cpu().numpy().astype(np.int64)


def make_problem(
    kind: Levels, K: int, N: int, group: int, B: int = 2, dead: tuple[int, ...] = (), seed: int = 0
) -> Problem:
    rng = np.random.default_rng([seed, K, N])
    W = single(rng.standard_normal((B, N, K)))
    inputs = [oracle.correlated_inputs(rng, 3 * K, K, rank=K // 8, noise=0.3) for _ in range(B)]
    for x in inputs:
        x[:, list(dead)] = 0
    H = np.stack([single(oracle.damped(x.T @ x, 0.01)) for x in inputs])
    levels = level_table(kind).double().numpy()
    peaks = np.abs(W).reshape(B, N, K // group, group).max(axis=3)
    return Problem(W, H, single(0.9 * peaks / np.abs(levels).max()), levels, group)


def single(x: oracle.Array) -> oracle.Array:
    return x.astype(np.float32).astype(np.float64)


def tensor(x: np.ndarray, device: torch.device) -> Tensor:
    """float64 [B, rows, columns] as float32, columns and rows exchanged, in the usual strides."""
    B, rows, columns = x.shape
    return torch.empty(B, columns, rows, device=device).copy_(torch.from_numpy(x).mT)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to holds NaN, or 255 where it holds bytes."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(4).isnan().all()) and torch.empty(4, dtype=torch.uint8).tolist() == [255] * 4
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


CPU = torch.device("cpu")


def fed_back(p: Problem, act_order: bool, device: torch.device = CPU) -> Tensor:
    """Codes [B, K, N], in the columns' own order, by `feed_back` with the oracle's factors."""
    orders = [column_order(H, act_order) for H in p.H]
    U = np.stack([oracle.upper_factor(H[np.ix_(order, order)]) for H, order in zip(p.H, orders, strict=True)])
    W = np.stack([W[:, order] for W, order in zip(p.W, orders, strict=True)])
    order_BK = torch.from_numpy(np.stack(orders)).to(device)
    with poisoned():
        chosen = feedback.feed_back(
            tensor(W, device), tensor(U.swapaxes(1, 2), device), tensor(p.scales, device), order_BK // p.group,
            torch.from_numpy(p.levels).float().to(device),
        )  # fmt: skip
    codes = torch.empty_like(chosen)
    for b, order in enumerate(order_BK):
        codes[b, order] = chosen[b]
    return codes


def column_order(H: oracle.Array, act_order: bool) -> np.ndarray:
    return np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(len(H))


def check_feed_back(p: Problem, act_order: bool, device: torch.device = CPU) -> None:
    """Codes are those of the loop, but for rows that leave it at a tie; those are few."""
    codes = fed_back(p, act_order, device)
    for b in range(len(p.W)):
        chosen = oracle.feedback(p.W[b], p.H[b], p.scales[b], p.group_of, p.levels, act_order)
        rows, margin = oracle.differing_rows(p.columns(b, codes), chosen, column_order(p.H[b], act_order))
        assert margin <= oracle.TIE and rows <= 1 + len(p.W[b]) // 50, (rows, margin)


def descended(p: Problem, sweeps: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Codes [B, K, N] and W - Q after some sweeps that begin with nearest rounding."""
    first = [oracle.rounded(W, scales, p.group_of, p.levels) for W, scales in zip(p.W, p.scales, strict=True)]
    codes = torch.from_numpy(np.stack([one.codes for one in first])).to(torch.uint8).mT.contiguous().to(device)
    E = tensor(p.W - np.stack([one.Q for one in first]), device)
    levels, scales = torch.from_numpy(p.levels).float().to(device), tensor(p.scales, device)
    with poisoned():
        for _ in range(sweeps):
            feedback.descend(E, codes, tensor(p.H, device), scales, levels)
    return codes, E


def check_descend(p: Problem, device: torch.device = CPU) -> None:
    """One sweep is the loop's, and W - Q is that of the codes."""
    codes, E = descended(p, 1, device)
    for b in range(len(p.W)):
        start = oracle.rounded(p.W[b], p.scales[b], p.group_of, p.levels).codes
        chosen = oracle.sweep(p.W[b], start, p.H[b], p.scales[b], p.group_of, p.levels)
        rows, margin = oracle.differing_rows(p.columns(b, codes), chosen, np.arange(p.W.shape[2]))
        assert margin <= oracle.TIE and rows <= 1 + len(p.W[b]) // 50, (rows, margin)
        Q = oracle.decoded(p.columns(b, codes), p.scales[b], p.group_of, p.levels)
        assert np.abs(p.W[b] - Q - E[b].t().cpu().numpy()).max() < 2e-6 * np.abs(p.W[b]).max()


def check_search(p: Problem, device: torch.device = CPU) -> None:
    """The scale of every group is one of those tried, and none of them has less error."""
    levels = torch.from_numpy(p.levels).float().to(device)
    with poisoned():
        found = feedback.search_scales(tensor(p.W, device), levels, p.group, SHARES).cpu().double().numpy()
    B, N, K = p.W.shape
    W = p.W.reshape(B, N, K // p.group, p.group)
    whole = np.abs(W).max(axis=3) / np.abs(p.levels).max()
    costs = np.stack([group_cost(W, share * whole, p.levels) for share in SHARES])
    chosen = found.swapaxes(1, 2)
    assert (
        np.isclose(chosen[..., None], np.stack([share * whole for share in SHARES], -1), rtol=1e-6).any(axis=-1).all()
    )
    assert (group_cost(W, chosen, p.levels) <= costs.min(axis=0) * (1 + 1e-5)).all()
    assert (costs.argmin(axis=0) != SHARES.index(1.0)).mean() > 0.3, "the search has nothing to find here"


def group_cost(W: oracle.Array, scales: oracle.Array, levels: oracle.Array) -> oracle.Array:
    """Square error of nearest rounding, [B, N, G], of W [B, N, G, columns]."""
    offs = np.abs(W[..., None] - levels * scales[..., None, None]).min(axis=-1)
    return (offs**2).sum(axis=-1)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("K", "group", "N"), [(64, 64, 1), (96, 32, 33), (160, 32, 40), (320, 64, 45)])
def test_error_feedback_is_the_papers_loop(kind: Levels, K: int, group: int, N: int, act_order: bool) -> None:
    check_feed_back(make_problem(kind, K, N, group, dead=(0, 7, K - 1)), act_order)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("K", "group", "N"), [(64, 64, 1), (96, 32, 33), (320, 64, 45)])
def test_a_sweep_is_the_plain_loop(kind: Levels, K: int, group: int, N: int) -> None:
    check_descend(make_problem(kind, K, N, group, dead=(3,)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 128])
def test_searched_scales_are_the_best_tried(kind: Levels, group: int) -> None:
    check_search(make_problem(kind, 256, 21, group))


def test_groups_of_zeros() -> None:
    """A scale of 0, under which all levels are one: codes are chosen, weights stay, nothing is NaN."""
    p = make_problem("nf4", 64, 4, 32)
    p.W[:, 1, :32] = 0
    p.scales[:, 1, 0] = 0
    assert float(feedback.search_scales(tensor(p.W, CPU), level_table("nf4"), 32, SHARES)[:, 0, 1].abs().max()) == 0
    check_feed_back(p, act_order=True)
    check_descend(p)


def damped_objective(p: Problem, b: int, codes: Tensor, scales: Tensor) -> float:
    own = scales[b].t().double().numpy()
    return oracle.objective(p.W[b], oracle.decoded(p.columns(b, codes), own, p.group_of, p.levels), p.H[b])


def coarse(wished: Tensor, group: int) -> Tensor:
    """A grid of scales with 6 bits of mantissa."""
    step = torch.exp2(torch.floor(torch.log2(wished.abs())) - 6)
    return torch.round(wished / step) * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", [None, lambda wished, group: wished, coarse], ids=["fixed", "free", "grid"])
def test_the_objective_never_rises(kind: Levels, fit: Callable[[Tensor, int], Tensor] | None) -> None:
    """Sweep by sweep, from nearest rounding to where no code changes; scales refitted before each sweep or not."""
    p = make_problem(kind, 64, 8, 32, dead=(5,))
    if fit is coarse:
        p = Problem(p.W, p.H, fit(torch.from_numpy(p.scales), 0).numpy(), p.levels, p.group)
    codes, E = descended(p, 0)
    levels, scales, H = torch.from_numpy(p.levels).float(), tensor(p.scales, CPU), tensor(p.H, CPU)
    course = [[damped_objective(p, b, codes, scales) for b in range(2)]]
    for _ in range(60):
        before = codes.clone(), scales.clone()
        feedback.descend(E, codes, H, scales, levels, fit)
        course.append([damped_objective(p, b, codes, scales) for b in range(2)])
        if torch.equal(before[0], codes) and torch.allclose(before[1], scales, rtol=1e-6):
            break
    else:
        pytest.fail("codes still change after 60 sweeps")
    assert (np.diff(course, axis=0) <= 1e-6 * np.array(course[:-1])).all(), course
    assert (np.array(course[0]) > 3 * np.array(course[-1])).all(), course
    assert no_change_is_better(p, codes, scales)
    if fit is not None:
        assert no_scale_is_better(p, codes, scales, 1e-3 if fit is not coarse else 2**-5)


def no_change_is_better(p: Problem, codes: Tensor, scales: Tensor) -> bool:
    """In float64, for each weight alone, whether none of the 16 codes would make the objective smaller."""
    for b in range(len(p.W)):
        own = scales[b].t().double().numpy()
        E = p.W[b] - oracle.decoded(p.columns(b, codes), own, p.group_of, p.levels)
        rows = np.einsum("nk,kl,nl->n", E, p.H[b], E)
        for k in range(p.W.shape[2]):
            for level in p.levels:
                tried = E.copy()
                tried[:, k] = p.W[b][:, k] - level * own[:, p.group_of[k]]
                if (np.einsum("nk,kl,nl->n", tried, p.H[b], tried) < rows * (1 - 1e-6)).any():
                    return False
    return True


def no_scale_is_better(p: Problem, codes: Tensor, scales: Tensor, share: float) -> bool:
    """In float64, whether no group's scale, made larger or smaller by `share` alone, would."""
    for b in range(len(p.W)):
        own = scales[b].t().double().numpy()
        rows = np.diag(residual_form(p, b, codes, own))
        for group in range(own.shape[1]):
            for factor in (1 - share, 1 + share):
                tried = own.copy()
                tried[:, group] *= factor
                if (np.diag(residual_form(p, b, codes, tried)) < rows).any():
                    return False
    return True


def residual_form(p: Problem, b: int, codes: Tensor, scales: oracle.Array) -> oracle.Array:
    E = p.W[b] - oracle.decoded(p.columns(b, codes), scales, p.group_of, p.levels)
    return E @ p.H[b] @ E.T


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_beside_every_midpoint(kind: Levels) -> None:
    """At each midpoint, one float32 to either side of it, at every level, far outside, and anywhere."""
    levels = level_table(kind)
    middles = (levels[:-1] + levels[1:]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, way)) for way in (-100.0, 100.0)]
    anywhere = 12 * torch.rand(20_000, generator=torch.Generator().manual_seed(0)) - 6
    x = torch.cat([middles, *beside, levels, torch.tensor([-1e30, 1e30]), anywhere * levels.abs().max() / 8])
    assert torch.equal(nearest_levels(x, levels).long(), (x[:, None] > middles).sum(dim=1))
    assert torch.equal(nearest_levels(x[:100].view(4, 25), levels).view(-1), nearest_levels(x[:100], levels))


def test_small_parts() -> None:
    """What the loops are surrounded by, against one line of float64 each; a block border lies within."""
    p = make_problem("int4", 160, 5, 32)
    codes, E = descended(p, 0)
    W = tensor(p.W, CPU)
    feedback.subtract(W, codes, tensor(p.scales, CPU), torch.from_numpy(p.levels).float())
    assert torch.allclose(W, E, rtol=0, atol=1e-6)
    with poisoned():
        forms = feedback.quadratic(tensor(p.H, CPU), E).double().numpy()
    for b in range(2):
        expected = np.diag(residual_form(p, b, codes, p.scales[b]))
        assert np.allclose(forms[b], expected, rtol=1e-5)
    levels = torch.tensor([-8.0, 0.0, 1.0, 4.0])
    halves = torch.tensor([-9.0, -4.0, -3.9, 0.5, 0.51, 2.5, 9.0])
    assert nearest_levels(halves, levels).tolist() == [0, 0, 1, 1, 2, 2, 3], "ties go to the lower level"
    assert feedback.inverse(torch.tensor([0.0, 4.0, -0.5])).tolist() == [0.0, 0.25, -2.0]
    assert [(part.start, part.stop) for part in feedback.blocks(320)] == [(0, 128), (128, 256), (256, 320)]


def check_kernels(kind: Levels, device: torch.device, K: int, N: int, group: int, B: int = 2) -> None:
    """All three kernels of a path on one awkward problem."""
    p = make_problem(kind, K, N, group, B, dead=(1,))
    check_feed_back(p, True, device)
    check_descend(p, device)
    check_search(p, device)


def check_interpreted() -> None:
    """The Triton kernels on the CPU, in the place of those that CPUs take.

    The interpreter needs 20 ms a column, so blocks of 20 columns stand for those of 128: 20 and 12 of 32.
    """
    from minibble.runtime.kernels.feedback import columns

    feedback._kernels = lambda device: columns  # type: ignore[assignment]
    feedback.BLOCK = 20
    check_kernels("nf4", CPU, K=32, N=33, group=32)
    check_kernels("int4", CPU, K=32, N=5, group=32, B=1)


def test_triton_kernels_interpreted() -> None:
    interpreted("test_feedback", "check_interpreted")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("K", "N", "group"), [(64, 33, 32), (320, 200, 64), (384, 17, 128)])
def test_cuda(cuda_device: torch.device, kind: Levels, K: int, N: int, group: int) -> None:
    check_kernels(kind, cuda_device, K, N, group)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_at_the_real_width(cuda_device: torch.device, kind: Levels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 128 columns in an expert's 6144 over its 18432 rows, on both paths: the same but for ties."""
    generator = torch.Generator(cuda_device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=cuda_device)

    levels, group = level_table(kind, cuda_device), 64 if kind == "nf4" else 128
    W, x = normal(1, 128, 18432), normal(6144, 128)
    H = (x.T @ x + 64 * torch.eye(128, device=cuda_device))[None]
    U = torch.linalg.cholesky(torch.linalg.inv(H.double())).mT.float()
    found = []
    for forced in ("", "reference"):
        monkeypatch.setenv("MINIBBLE_KERNELS", forced)
        with poisoned():
            scales = feedback.search_scales(W, levels, group, SHARES)
            group_BK = torch.arange(128, device=cuda_device)[None] // group
            codes = feedback.feed_back(W.clone(), U, scales, group_BK, levels)
            E = W.clone()
            feedback.subtract(E, codes, scales, levels)
            before = feedback.quadratic(H, E).double().sum()
            feedback.descend(E, codes, H, scales, levels)
        found.append((scales, codes, before.item(), feedback.quadratic(H, E).double().sum().item()))
    (scales, codes, fed, swept), (scales2, codes2, fed2, swept2) = found
    assert float((scales != scales2).float().mean()) < 1e-3  # two shares with the same error to float32
    assert float((codes != codes2).any(dim=1).float().mean()) < 0.01
    assert fed == pytest.approx(fed2, rel=1e-4) and swept == pytest.approx(swept2, rel=1e-4) and swept < fed
