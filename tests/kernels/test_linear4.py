"""Products with 4-bit matrices: every path against the float32 reference. M tokens, N rows, K columns."""

from pathlib import Path

import pytest
import torch
from golden.kernel_checks import interpreted, relative

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import cpu as cpu_path
from minibble.runtime.kernels.linear4 import cpu_int4, gemv, prepare, reference

SHAPES = [((32, 64),), ((96, 128), (32, 128)), ((1, 192), (7, 192), (24, 192))]
# Whole matrices for torch's int4 kernel, rows that are none of its multiples of 16, and more rows than it lays out
# at a time; groups that it cannot do, and that the compiled loop cannot.
INT4 = [
    (Int4(128), ((48, 256),)), (Int4(64), ((96, 128), (32, 128))), (Int4(32), ((8, 192), (8, 192), (24, 192))),
    (Int4(128), ((1040, 128),)), (Int4(16), ((32, 64),)), (Int4(192), ((16, 384),)),
]  # fmt: skip


def parts(shapes: tuple[tuple[int, int], ...], format: Format = NF4()) -> list[QuantizedTensor]:  # noqa: B008 (frozen)
    generator = torch.Generator().manual_seed(sum(n for n, _ in shapes))
    return [format.encode(torch.randn(*shape, generator=generator)) for shape in shapes]


def check(
    device: torch.device,
    shapes: tuple[tuple[int, int], ...],
    M: int,
    dtype: torch.dtype,
    bound: float,
    format: Format = NF4(),  # noqa: B008 (frozen)
) -> None:
    held = parts(shapes, format)
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


@pytest.mark.parametrize("M", [1, 2, 17, 63])
@pytest.mark.parametrize(("format", "shapes"), INT4, ids=str)
@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_cpu_int4(
    format: Int4,
    shapes: tuple[tuple[int, int], ...],
    M: int,
    dtype: torch.dtype,
    bound: float,
    numba: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not numba:
        monkeypatch.setattr(cpu_int4, "available", lambda: False)
    check(torch.device("cpu"), shapes, M, dtype, bound, format)


def test_int4_takes_the_path_that_suits() -> None:
    def path(format: Int4, shape: tuple[int, int], dtype: torch.dtype) -> tuple[bool, bool]:
        packed = cpu_int4.PackedLinear(parts((shape,), format), dtype)
        return packed.kernel, packed.arrays is not None

    loop = cpu_path.available()
    assert path(Int4(128), (32, 256), torch.bfloat16) == (True, False)
    assert path(Int4(128), (32, 256), torch.float32) == (False, loop)
    assert path(Int4(128), (24, 256), torch.bfloat16) == (False, loop)
    assert path(Int4(32), (32, 256), torch.float32) == (False, False)


@pytest.mark.parametrize("rows", [16, 48, 64, 1024, 1040, 2100 // 16 * 16])
def test_int4_laid_out_in_pieces_is_as_in_one(rows: int) -> None:
    codes = torch.randint(0, 256, (rows, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    whole = torch.stack((codes >> 4, codes & 0xF), dim=-1).flatten(1).int()
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    assert torch.equal(cpu_int4.kernel_codes(codes), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_activations_of_any_layout(dtype: torch.dtype) -> None:
    """Batches, strides, and weights held in no more bytes than planned: half a byte and 4 bytes a group."""
    held = parts(((64, 128),), Int4(64))
    packed = prepare(held, torch.device("cpu"), dtype)
    x = torch.randn(128, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype).permute(2, 1, 0)
    y = packed(x, dtype)
    assert y.shape == (3, 2, 64) and relative(y, reference.linear(x, held)) < 4e-3
    assert packed.nbytes == 64 * 128 // 2 + 4 * 64 * 2


@pytest.mark.parametrize("format", [NF4(), Int4(64), Int4(128)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_shared_among_threads(monkeypatch: pytest.MonkeyPatch, threads: int, format: Format) -> None:
    """Whatever the shares, every row is written once; N that is no multiple of the shares too."""
    if not cpu_path.available():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(gemv, "SPLIT", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for N in (4, 36, 100):
        held = parts(((N, 256),), format)
        x = torch.randn(1, 256)
        packed = prepare(held, torch.device("cpu"), torch.float32)
        assert packed.arrays is not None, "the compiled loop was not chosen"
        assert relative(packed(x, torch.float32), reference.linear(x, held)) < 1e-6


@pytest.mark.parametrize("double_quant", [True, False])
def test_cpu_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch, double_quant: bool) -> None:
    held = parts(((48, 128), (16, 128)), NF4(double_quant=double_quant))
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
    assert packed.repacked


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


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize(("format", "shapes"), [*INT4, (Int4(128), ((9216, 6144), (9216, 6144)))], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_cuda_int4(
    cuda_device: torch.device,
    format: Int4,
    shapes: tuple[tuple[int, int], ...],
    M: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    check(cuda_device, shapes, M, dtype, bound, format)


def check_decode(
    device: torch.device,
    shape: tuple[int, int],
    format: Format,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    """The Triton kernel against the format's own decoding, bit by bit, over poisoned outputs."""
    from minibble.runtime.kernels.linear4.decode import decode_into

    (q,) = parts((shape,), format)
    for dtype in dtypes:
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=device)
        decode_into(out, q.to(device))
        assert torch.equal(out.cpu(), format.decode(q, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("format", [NF4(), NF4(double_quant=False), Int4(64)], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 192), (3072, 6144)])
def test_cuda_decodes_to_the_same_bits(cuda_device: torch.device, shape: tuple[int, int], format: Format) -> None:
    check_decode(cuda_device, shape, format)


def test_decode_kernel_interpreted() -> None:
    """The same kernel on the CPU through Triton's interpreter."""
    interpreted("test_linear4", "check_interpreted")


def check_interpreted() -> None:
    """In float32 only: the interpreter cuts float32 off to bfloat16 where a GPU rounds."""
    for format in (NF4(), NF4(double_quant=False), Int4(64), Int4(8)):
        for shape in ((1, 64), (7, 192), (40, 256)):
            check_decode(torch.device("cpu"), shape, format, (torch.float32,))


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
