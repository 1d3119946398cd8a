"""Products with 4-bit matrices: every path against the float32 reference. M tokens, N rows, K columns."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minibble.quantize.nf4 import NF4
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import cpu as cpu_path
from minibble.runtime.kernels.linear4 import gemv, prepare, reference

SHAPES = [((32, 64),), ((96, 128), (32, 128)), ((1, 192), (7, 192), (24, 192))]


def parts(shapes: tuple[tuple[int, int], ...], double_quant: bool = True) -> list[QuantizedTensor]:
    generator = torch.Generator().manual_seed(sum(n for n, _ in shapes))
    return [NF4(double_quant=double_quant).encode(torch.randn(*shape, generator=generator)) for shape in shapes]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def check(device: torch.device, shapes: tuple[tuple[int, int], ...], M: int, dtype: torch.dtype, bound: float) -> None:
    held = parts(shapes)
    x = torch.randn(M, shapes[0][1], generator=torch.Generator().manual_seed(M)).to(dtype)
    expected = reference.linear(x, held)
    packed = prepare(held, device, dtype)
    for out_dtype, allowed in ((dtype, bound), (torch.float32, bound)):
        y = packed(x.to(device), out_dtype)
        assert y.shape == expected.shape and y.dtype == out_dtype
        assert relative(y.cpu(), expected) < allowed


@pytest.mark.parametrize("M", [1, 2, 17, 63])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_cpu(shapes: tuple[tuple[int, int], ...], M: int, dtype: torch.dtype, bound: float) -> None:
    check(torch.device("cpu"), shapes, M, dtype, bound)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_shared_among_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Whatever the shares, every row is written once; N that is no multiple of the shares too."""
    if not cpu_path.available():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(gemv, "SPLIT", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for N in (4, 36, 100):
        held = parts(((N, 128),))
        x = torch.randn(1, 128)
        packed = prepare(held, torch.device("cpu"), torch.float32)
        assert packed.arrays is not None, "the compiled loop was not chosen"
        assert relative(packed(x, torch.float32), reference.linear(x, held)) < 1e-6


@pytest.mark.parametrize("double_quant", [True, False])
def test_cpu_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, double_quant: bool) -> None:
    held = parts(((48, 128), (16, 128)), double_quant)
    x = torch.randn(3, 128)
    monkeypatch.setattr(cpu_path, "bitsandbytes", lambda: None)
    monkeypatch.setattr(cpu_path, "has_fused", lambda: False)
    monkeypatch.setattr(cpu_path, "available", lambda: False)
    assert cpu_path.path() == "torch"
    packed = prepare(held, torch.device("cpu"), torch.float32)
    assert relative(packed(x, torch.float32), reference.linear(x, held)) < 1e-6


def test_fused_is_used_where_it_exists() -> None:
    if not cpu_path.has_fused():
        pytest.skip("this CPU has no AVX512-BF16, or bitsandbytes is not installed")
    packed = cpu_path.PackedLinear(parts(((64, 128),)), torch.bfloat16)
    assert packed.fused_state is not None


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIBBLE_KERNELS", "reference")
    packed = prepare(parts(((32, 64),)), torch.device("cpu"), torch.float32)
    assert type(packed).__name__ == "ReferencePacked"


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 17, 63])
@pytest.mark.parametrize("shapes", [*SHAPES, ((9216, 6144), (9216, 6144))])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_cuda(
    cuda_device: torch.device, shapes: tuple[tuple[int, int], ...], M: int, dtype: torch.dtype, bound: float
) -> None:
    check(cuda_device, shapes, M, dtype, bound)


def check_decode(
    device: torch.device,
    shape: tuple[int, int],
    double_quant: bool,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    """The Triton kernel against the format's own decoding, bit by bit, over poisoned outputs."""
    from minibble.runtime.kernels.linear4.decode import decode_into

    (q,) = parts((shape,), double_quant)
    for dtype in dtypes:
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=device)
        decode_into(out, q.to(device))
        assert torch.equal(out.cpu(), NF4(double_quant=double_quant).decode(q, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 192), (3072, 6144)])
def test_cuda_decodes_to_the_same_bits(cuda_device: torch.device, shape: tuple[int, int], double_quant: bool) -> None:
    check_decode(cuda_device, shape, double_quant)


def test_decode_kernel_interpreted() -> None:
    """The same kernel on the CPU through Triton's interpreter, which must be chosen before triton is imported.

    In float32 only: the interpreter cuts float32 off to bfloat16 where a GPU rounds.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    program = (
        "import torch, test_linear4 as t\n"
        "for double_quant in (True, False):\n"
        "    for shape in ((1, 64), (7, 192), (40, 256)):\n"
        "        t.check_decode(torch.device('cpu'), shape, double_quant, (torch.float32,))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_model_on_cuda_equals_cpu(cuda_device: torch.device, tmp_path: Path) -> None:
    """Float32 logits of the built-in model in NF4, a left-padded batch, prefill and decode."""
    import minibble
    from minibble.quantize.builtin import demo_path
    from minibble.quantize.job import quantize_checkpoint
    from minibble.runtime.state import HybridState

    out = quantize_checkpoint(demo_path(), tmp_path / "nf4", device="cpu").out
    ids = torch.randint(4, 2000, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    logits = []
    for device in ("cpu", cuda_device):
        model = minibble.load(out, device=device, dtype=torch.float32)
        state = HybridState(model.minibble)
        with torch.no_grad():
            first = model(ids[:, :60].to(device), mask[:, :60].to(device), past_key_values=state).logits
            steps = [
                model(ids[:, t : t + 1].to(device), mask[:, : t + 1].to(device), past_key_values=state).logits
                for t in range(60, 70)
            ]
        logits.append(torch.cat([first, *steps], dim=1).cpu()[:, 9:])
    cpu, cuda = logits
    assert float((cpu - cuda).abs().max() / cpu.abs().max()) < 1e-4
