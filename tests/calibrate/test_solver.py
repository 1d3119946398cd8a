"""The solver as a whole: against the paper's loop in float64, and the file against what was optimised."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import gptq_float64 as oracle
from torch import Tensor

from minibble.calibrate import solver
from minibble.calibrate.solver import Part, SolverSettings, solve
from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.measure import relative_error
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode_absmax, level_table
from minibble.quantize.tensors import QuantizedTensor

DAMP = 0.01
FEEDBACK = SolverSettings(damp=DAMP, sweeps=0)
REFITTED = SolverSettings(damp=DAMP, sweeps=solver.FIT_EVERY + 1)
CASES: list[tuple[Format, int]] = [
    (NF4(), 64),
    (NF4(), 320),
    (NF4(32), 96),
    (NF4(32, double_quant=False), 160),
    (Int4(32), 96),
    (Int4(32), 160),
    (Int4(64), 320),
    (Int4(128), 128),
]
NAMES = [f"{format.name}-{format.block_size}-K{K}" for format, K in CASES]
ROWS = [13, 24]


@dataclass(frozen=True)
class Problem:
    """Two matrices [B, N, K] in bf16 digits and their Hessians [B, K, K], undamped."""

    W: oracle.Array
    H: oracle.Array

    def solve(
        self, format: Format, settings: SolverSettings, rows: list[int] | None = None
    ) -> tuple[list[list[Part]], Tensor]:
        """The parts, and what the solver left in the place of the weights, [B, K, N]."""
        W = torch.from_numpy(self.W).float().mT.contiguous()
        parts = solve(W, torch.from_numpy(self.H).float(), rows or [self.W.shape[1]], format, settings, torch.bfloat16)
        return parts, W


def make_problem(K: int, N: int = sum(ROWS), dead: tuple[int, ...] = (), seed: int = 0, noise: float = 0.3) -> Problem:
    rng = np.random.default_rng([seed, K, N])
    W = torch.from_numpy(rng.standard_normal((2, N, K))).bfloat16().double().numpy()
    inputs = [oracle.correlated_inputs(rng, 3 * K, K, K // 8, noise) for _ in range(2)]
    for x in inputs:
        x[:, list(dead)] = 0
    return Problem(W, np.stack([(x.T @ x).astype(np.float32).astype(np.float64) for x in inputs]))


def codes_of(q: QuantizedTensor) -> np.ndarray:
    """Codes [N, K] of a stored matrix."""
    return torch.stack((q.codes >> 4, q.codes & 15), dim=1).view(q.shape).numpy().astype(np.int64)


def scales_of(q: QuantizedTensor) -> oracle.Array:
    """Scales [N, G] of a stored matrix, as files hold them."""
    return decode_absmax(q).double().view(q.shape[0], -1).numpy()


def group_of(format: Format, K: int) -> np.ndarray:
    return np.arange(K) // format.block_size


def table(format: Format) -> oracle.Array:
    return level_table(format.levels).double().numpy()


def values(format: Format, q: QuantizedTensor) -> oracle.Array:
    return format.decode(q).double().numpy()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("format", "K"), CASES, ids=NAMES)
def test_equals_the_papers_loop_in_float64(format: Format, K: int, act_order: bool) -> None:
    """From weights and Hessian to codes: the same but for ties, and where they are the same, so is the objective."""
    p = make_problem(K, dead=(0, 9, K - 1))
    parts, _ = p.solve(format, replace(FEEDBACK, act_order=act_order))
    for b, [part] in enumerate(parts):
        H = oracle.damped(p.H[b], DAMP)
        chosen = oracle.feedback(p.W[b], H, scales_of(part.q), group_of(format, K), table(format), act_order)
        order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(K)
        rows, margin = oracle.differing_rows(codes_of(part.q), chosen, order)
        assert margin <= oracle.TIE and rows <= 1, (rows, margin)
        same = (codes_of(part.q) == chosen.codes).all(axis=1)
        W, Q = p.W[b][same], values(format, part.q)[same]
        expected = oracle.objective(W, chosen.Q[same], H)
        assert oracle.objective(W, Q, H) == pytest.approx(expected, rel=1e-6)
        assert part.damp == DAMP


@pytest.mark.parametrize(("format", "K"), CASES, ids=NAMES)
def test_beats_rounding_by_the_loops_factor(format: Format, K: int) -> None:
    p = make_problem(K, noise=0.05)
    parts, _ = p.solve(format, FEEDBACK)
    for b, [part] in enumerate(parts):
        H, scales = oracle.damped(p.H[b], DAMP), scales_of(part.q)
        loop = oracle.feedback(p.W[b], H, scales, group_of(format, K), table(format), True)
        nearest = oracle.rounded(p.W[b], scales, group_of(format, K), table(format))
        before = oracle.objective(p.W[b], nearest.Q, H)
        ours = before / oracle.objective(p.W[b], values(format, part.q), H)
        assert ours > 3
        assert ours == pytest.approx(before / oracle.objective(p.W[b], loop.Q, H), rel=0.01)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, QuantizedTensor]]]:
    """Each matrix as the solver ended with it, level times scale [N, K], beside what it stored."""
    seen: list[tuple[Tensor, QuantizedTensor]] = []
    whole = solver.quantized

    def watched(codes: Tensor, scale: Tensor, grid: Any, b: int, rows: slice, format: Format, dtype: Any) -> Any:
        q = whole(codes, scale, grid, b, rows, format, dtype)
        each = scale[b, :, rows].repeat_interleave(format.block_size, dim=0)
        seen.append(((level_table(format.levels)[codes[:, rows].int()] * each).t(), q))
        return q

    monkeypatch.setattr(solver, "quantized", watched)
    yield seen


@pytest.mark.parametrize(("format", "K"), CASES, ids=NAMES)
def test_the_file_decodes_to_what_was_optimised(
    format: Format, K: int, stored: list[tuple[Tensor, QuantizedTensor]]
) -> None:
    """Bit by bit, second-level scales included, for parts that share a Hessian; the residual is W - decode(q)."""
    p = make_problem(K)
    parts, left = p.solve(format, REFITTED, ROWS)
    assert len(stored) == 4
    for optimised, q in stored:
        assert torch.equal(format.decode(q), optimised)
    for b, both in enumerate(parts):
        W, names = torch.from_numpy(p.W[b]).float().split(ROWS), (left[b].t().split(ROWS))
        for weight, part, residual in zip(W, both, names, strict=True):
            assert torch.allclose(weight - format.decode(part.q), residual, rtol=0, atol=4e-6)
            packed = format.pack("a.weight", part.q)
            again = format.unpack("a.weight", part.q.shape, packed.__getitem__) if len(weight) % 8 == 0 else part.q
            assert torch.equal(format.decode(again), format.decode(part.q))
            assert part.q.source_dtype == torch.bfloat16 and part.q.levels == format.levels


@pytest.mark.parametrize(("format", "K"), CASES[2:5:2], ids=NAMES[2:5:2])
def test_errors_are_measured_without_the_damping(format: Format, K: int) -> None:
    p = make_problem(K, dead=(2,))
    parts, _ = p.solve(format, replace(REFITTED, damp=0.5), ROWS)
    for b, both in enumerate(parts):
        for part, W in zip(both, np.split(p.W[b], np.cumsum(ROWS)[:-1]), strict=True):
            Q = values(format, part.q)
            expected = oracle.objective(W, Q, p.H[b]) / oracle.objective(W, np.zeros_like(W), p.H[b])
            assert part.output_error == pytest.approx(expected, rel=2e-5) and part.damp == 0.5
            own = relative_error(format, torch.from_numpy(W), part.q)
            assert part.relative_error == pytest.approx(own, rel=2e-5)


@pytest.mark.parametrize(("format", "K"), CASES[2:5], ids=NAMES[2:5])
def test_more_sweeps_never_cost(format: Format, K: int) -> None:
    """From sweep to sweep, the one that refits scales included, on the grids of the files."""
    p = make_problem(K, N=9)
    course, scales = [], []
    for sweeps in (0, 1, solver.FIT_EVERY, solver.FIT_EVERY + 1, solver.FIT_EVERY + 2):
        parts, _ = p.solve(format, replace(FEEDBACK, sweeps=sweeps))
        found = [(part.q, p.W[b], oracle.damped(p.H[b], DAMP)) for b, [part] in enumerate(parts)]
        course.append([oracle.objective(W, values(format, q), H) for q, W, H in found])
        scales.append(scales_of(found[0][0]))
    assert (np.diff(course, axis=0) <= 1e-6 * np.array(course[:-1])).all(), course
    assert (np.array(course[-1]) < 0.97 * np.array(course[0])).all(), course
    assert (scales[0] == scales[2]).all() and (scales[2] != scales[3]).mean() > 0.5, "scales are refitted once"


@pytest.mark.parametrize("format", [NF4(), NF4(double_quant=False), Int4(64)], ids=lambda format: format.name)
def test_dead_and_constant_inputs(format: Format) -> None:
    """A dead input's weights are rounded to nearest under the group's scale; a constant one is an input like others."""
    rng = np.random.default_rng(5)
    x = oracle.correlated_inputs(rng, 400, 128, 16)
    x[:, 3], x[:, 70] = 0, 5
    p = Problem(make_problem(128).W[:1], (x.T @ x)[None])
    [[part]], _ = p.solve(format, REFITTED)
    chosen = oracle.rounded(p.W[0], scales_of(part.q), group_of(format, 128), table(format))
    dead = codes_of(part.q)[:, 3] == chosen.codes[:, 3]
    assert dead.all() or chosen.margins[~dead, 3].max() <= oracle.TIE
    assert (
        0 < part.output_error < 0.2 * oracle.objective(p.W[0], chosen.Q, p.H[0]) / np.trace(p.W[0] @ p.H[0] @ p.W[0].T)
    )


@pytest.mark.parametrize("format", [NF4(), NF4(double_quant=False), Int4(64)], ids=lambda format: format.name)
def test_nothing_in_nothing_out(format: Format) -> None:
    """All-zero rows and all-zero inputs: finite scales, zeros stay zeros, and the errors are 0."""
    p = make_problem(128)
    p.W[0] = 0
    p.W[1, 3] = 0
    p.H[1] = 0
    parts, _ = p.solve(format, REFITTED)
    (zero,), (unseen,) = parts
    assert zero.relative_error == zero.output_error == unseen.output_error == 0 < unseen.relative_error < 0.02
    assert np.abs(values(format, zero.q)).max() == 0 and np.abs(values(format, unseen.q)[3]).max() == 0
    assert np.isfinite(scales_of(zero.q)).all() and np.isfinite(scales_of(unseen.q)).all()


@pytest.mark.parametrize("format", [NF4(), Int4(64)], ids=lambda format: format.name)
def test_a_hessian_that_is_not_positive_definite_is_damped_more(format: Format) -> None:
    """One matrix of two; the other is solved as if it were alone."""
    p = make_problem(128)
    lowest = np.linalg.eigvalsh(p.H[0])[0]
    shift = lowest + 0.04 * np.diag(p.H[0]).mean()
    p.H[0] -= shift * np.eye(128)
    parts, _ = p.solve(format, replace(FEEDBACK, sweeps=2))
    assert parts[0][0].damp > DAMP == parts[1][0].damp
    alone, _ = Problem(p.W[1:], p.H[1:]).solve(format, replace(FEEDBACK, sweeps=2))
    assert torch.equal(alone[0][0].q.codes, parts[1][0].q.codes)
