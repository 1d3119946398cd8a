"""Lightning attention: the quick paths against the token-by-token reference. B batch, T tokens, H heads, K head dim."""

from itertools import product

import pytest
import torch
from golden.kernel_checks import interpreted, poisoned
from torch import Tensor

from minibble.runtime.kernels import compiled, lightning
from minibble.runtime.kernels.lightning import blocked, reference
from minibble.runtime.kernels.lightning.cuts import cut

H, K, EPS = 3, 16, 1e-6
SLOPES = (0.5, 0.01, 1e-5)


def case(B: int, T: int, seed: int = 0, H: int = H, K: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(B, T, 4 * H * K, generator=generator)
    state = torch.randn(B, H, K, K, generator=generator)
    slope = torch.tensor([SLOPES[h % 3] for h in range(H)])
    return projected, slope, state, torch.rand(H * K, generator=generator) + 0.5


def expected(case: tuple[Tensor, ...], valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In float64, from the formulas."""
    projected, slope, state, norm = (x.double() for x in case)
    H, K = state.shape[1:3]
    qkv = projected[..., : 3 * H * K] * torch.sigmoid(projected[..., : 3 * H * K])
    qkv = qkv.view(*projected.shape[:2], H, 3 * K)
    if valid is not None:
        qkv = qkv * valid[:, :, None, None]
    q, k, v = qkv.split(K, dim=-1)
    o, state = reference.lightning(q, k, v, slope, state, valid)
    o = o.flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    return o * torch.sigmoid(projected[..., 3 * H * K :]), state


def blocked_float64(case: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """As `expected`, in blocks: for many tokens."""
    projected, slope, state, norm = (x.double() for x in case)
    H, K = state.shape[1:3]
    qkv, gate = projected.split((3 * H * K, H * K), dim=-1)
    q, k, v = (qkv * torch.sigmoid(qkv)).view(*projected.shape[:2], H, 3 * K).split(K, dim=-1)
    o, state = blocked.prefill(q, k, v, slope, state, None)
    o = o.flatten(2)
    return o / (o.square().mean(-1, keepdim=True) + EPS).sqrt() * norm * torch.sigmoid(gate), state


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


def test_cuts() -> None:
    """Pieces are whole blocks, all segments but the last whole pieces, and none is empty."""
    for tokens, rows, processors in product((1, 63, 64, 65, 512, 1999, 8192, 100_001), (1, 3, 64, 300), (1, 20, 264)):
        cuts = cut(tokens, rows, processors)
        whole = (cuts.segments - 1) * cuts.each * cuts.piece
        assert cuts.piece % 64 == 0 and whole < tokens <= whole + cuts.each * cuts.piece
        assert cuts.segments == 1 or rows * cuts.segments <= processors
    assert cut(8192, 64, 264) == (4, 1, 2048)


Made = tuple[Tensor, Tensor]


def rounded(made: tuple[Tensor, ...], device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The case with its projections in bfloat16, on a device."""
    return tuple(x.to(device) for x in (made[0].bfloat16(), *made[1:]))


def check_bfloat16(ours: Made, right: Made, valid: Tensor | None, output: float, state: float) -> None:
    """Relative errors of a bfloat16 output, where tokens are real, and of a float32 state."""
    rows = slice(None) if valid is None else valid
    assert ours[0].dtype == torch.bfloat16 and ours[0].shape == right[0].shape and ours[1].dtype == torch.float32
    assert bool(ours[0].isfinite().all()), "padding may be anything, but not NaN"
    assert float((ours[0].double() - right[0])[rows].norm() / right[0][rows].norm()) < output
    assert float((ours[1].double() - right[1]).norm() / right[1].norm()) < state


def padding(B: int, T: int, device: torch.device | str = "cpu") -> Tensor:
    """Half of the first sequence, from the left, and tokens here and there."""
    valid = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) > 0.3
    valid[0, : T // 2] = False
    valid[:, -1] = True
    return valid.to(device)


def check_interpreted() -> None:
    from minibble.runtime.kernels.lightning import cuts
    from minibble.runtime.kernels.lightning.decode import decode
    from minibble.runtime.kernels.lightning.prefill import prefill

    for B, heads, dim in ((1, 3, 16), (3, 2, 24), (2, 5, 32), (1, 2, 128)):
        made = case(B, 1, H=heads, K=dim)
        state = made[2].clone()
        with poisoned():
            o = decode(made[0][:, 0], made[1], state, made[3], EPS)
        compare((o.unsqueeze(1), state), expected(made))
    cuts.LEAST_SEGMENT = cuts.LEAST_PIECE = 64
    sizes = [(1, 1, 3, 16, 1), (2, 65, 3, 16, 1), (2, 300, 3, 16, 20), (1, 130, 2, 32, 5), (2, 63, 3, 24, 1)]
    for (B, T, heads, dim, processors), padded in product([*sizes, (1, 70, 1, 128, 2)], (False, True)):
        made = rounded(case(B, T, H=heads, K=dim))
        valid, state = padding(B, T) if padded else None, made[2].clone()
        with poisoned():
            o, factors = prefill(made[0], made[1], state, made[3], EPS, valid, processors)
        assert factors is None  # but for the kernels that are not Triton's
        # The interpreter rounds bfloat16 towards zero.
        check_bfloat16((o, state), expected(made, valid), valid, output=5e-3, state=5e-4)


def test_interpreted() -> None:
    interpreted("test_lightning", "check_interpreted")


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "K"), [(64, 128), (3, 16), (5, 24), (2, 96), (3, 64)])
@pytest.mark.parametrize("B", [1, 2, 3, 17, 64])
def test_cuda_decode(cuda_device: torch.device, B: int, H: int, K: int) -> None:
    made = rounded(case(B, 1, H=H, K=K), cuda_device)
    state = made[2].clone()
    for _ in range(2):  # the first launch leaves the counters as it found them
        right = expected((made[0], made[1], state, made[3]))
        with poisoned(), torch.no_grad():
            ours = lightning.gated(made[0], made[1], state, made[3], EPS, None)
        assert ours[1] is state
        check_bfloat16(ours, right, None, output=2.5e-3, state=1e-6)


@pytest.mark.gpu
def test_cuda_decode_in_a_graph(cuda_device: torch.device) -> None:
    made = rounded(case(2, 1, H=64, K=128), cuda_device)
    state = made[2].clone()
    with torch.no_grad():
        lightning.gated(made[0], made[1], state.clone(), made[3], EPS, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = lightning.gated(made[0], made[1], state, made[3], EPS, None)
    for seed in range(3):
        made[0].copy_(case(2, 1, seed, H=64, K=128)[0])
        right = expected((made[0], made[1], state, made[3]))
        graph.replay()
        check_bfloat16((o, state), right, None, output=2.5e-3, state=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("by_hand", [True, False], ids=["cuda", "triton"])
@pytest.mark.parametrize(
    ("B", "T", "H", "K"),
    [(1, 2, 3, 128), (2, 17, 3, 128), (1, 63, 3, 128), (3, 64, 2, 128), (1, 65, 5, 128), (2, 300, 64, 128),
     (1, 2048, 64, 128), (1, 2100, 3, 128), (2, 300, 3, 16), (1, 1999, 3, 24), (2, 700, 2, 96), (2, 300, 5, 64)],
)  # fmt: skip
def test_cuda_prefill(
    cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    B: int,
    T: int,
    H: int,
    K: int,
    by_hand: bool,
    padded: bool,
) -> None:
    from minibble.runtime.kernels.lightning import by_hand as kernels

    if not by_hand:
        monkeypatch.setattr(kernels, "suits", lambda device, head_dim: False)
    elif not kernels.suits(cuda_device, K):
        pytest.skip("not for these heads, or not on this GPU")
    made = rounded(case(B, T, H=H, K=K), cuda_device)
    valid, state = padding(B, T, cuda_device) if padded else None, made[2].clone()
    right = expected(made, valid)
    with poisoned(), torch.no_grad():
        o, factors, after = lightning.gated_with_factors(made[0], made[1], state, made[3], EPS, valid)
    assert after is state and (factors is not None) == by_hand
    check_bfloat16((lightning.scaled(o, factors), state), right, valid, output=3e-3, state=1e-3)


@pytest.mark.gpu
def test_cuda_prefill_carries_over_pieces(cuda_device: torch.device) -> None:
    """Heads that forget within a piece and heads that do not: pieces leave out what has decayed."""
    projected, _, state, norm = case(1, 8192, H=64, K=128)
    slope = torch.tensor([2.0 ** (-(h + 1) / 8) for h in range(64)])
    made = rounded((projected, slope, state, norm), cuda_device)
    right = blocked_float64(made)
    with poisoned(), torch.no_grad():
        o, factors, after = lightning.gated_with_factors(made[0], made[1], made[2].clone(), made[3], EPS, None)
    check_bfloat16((lightning.scaled(o, factors), after), right, None, output=3e-3, state=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "shift"), [(1e-2, 0), (10, 0), (1000, 0), (1, -3), (1, 3)])
def test_cuda_prefill_of_any_magnitude(cuda_device: torch.device, scale: float, shift: float) -> None:
    """Scores up to 1e8 and states up to 1e9: float16 alone would have no room for them. All state is the tokens'."""
    projected, slope, state, norm = case(1, 700, H=3, K=128)
    made = rounded(((projected + shift) * scale, slope, torch.zeros_like(state), norm), cuda_device)
    right = expected(made)
    with poisoned(), torch.no_grad():
        ours = lightning.gated(made[0], made[1], made[2].clone(), made[3], EPS, None)
    check_bfloat16(ours, right, None, output=3e-3, state=1e-3)


@pytest.mark.gpu
def test_cuda_gradients_take_the_torch_path(cuda_device: torch.device) -> None:
    projected, slope, state, norm = rounded(case(1, 5), cuda_device)
    norm.requires_grad_()
    o, _ = lightning.gated(projected, slope, state, norm, EPS, None)
    o.sum().backward()
    assert norm.grad is not None and norm.grad.isfinite().all()
