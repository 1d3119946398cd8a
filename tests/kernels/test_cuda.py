"""Products on CUDA against float64 ones, through the packages that choose the kernels. M tokens, N rows, K columns."""

import pytest
import torch
from golden.kernel_checks import relative

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode, level_table
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.linear4 import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not nvrtc.available(), reason="cuda-bindings is not installed"),
]

FORMATS = [NF4(), NF4(double_quant=False), Int4(128), Int4(64), Int4(32)]
TOKENS = [1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 300]
BOUND = 3e-3  # bfloat16 results; rounding them alone is 1.7e-3


def random_matrix(N: int, K: int, format: Format, generator: torch.Generator) -> QuantizedTensor:
    """Random codes, scales around those of weights with deviation 1 / sqrt(K)."""
    device = generator.device
    codes = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device, generator=generator)
    scales = 0.5 + torch.rand(N * K // format.block_size, device=device, generator=generator)
    return format.assemble((N, K), codes, scales * (K**-0.5 / level_table(format.levels, device).std()))


def poison(device: torch.device) -> None:
    """Fill freed memory with NaN, so that what a kernel leaves out is seen."""
    blocks = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(16)]
    del blocks


@pytest.fixture
def generator(cuda_device: torch.device) -> torch.Generator:
    return torch.Generator(device=cuda_device).manual_seed(0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [(48,), (2064, 80), (16, 32, 7)], ids=str)
@pytest.mark.parametrize("K", [256, 1536, 6144, 8192])
def test_products(format: Format, rows: tuple[int, ...], K: int, generator: torch.Generator) -> None:
    from minibble.runtime.kernels.linear4 import cuda

    parts = [random_matrix(n, K, format, generator) for n in rows]
    packed = cuda.prepare(parts, torch.bfloat16)
    assert isinstance(packed, cuda.TiledLinear)
    weight = torch.cat([decode(q) for q in parts]).double()
    for M in TOKENS:
        x = torch.randn(M, K, device=generator.device, generator=generator).bfloat16()
        exact = x.double() @ weight.t()
        poison(x.device)
        assert relative(packed(x, torch.bfloat16), exact) < BOUND
        assert relative(packed(x, torch.float32), exact) < BOUND
        assert relative(packed.partial(x).sum(0), exact) < BOUND
        factors = 0.5 + torch.rand(M, device=x.device, generator=generator)
        assert relative(linear(x, packed, factors=factors), exact * factors[:, None]) < BOUND


@pytest.mark.parametrize("format", [NF4(), Int4(128)], ids=str)
@pytest.mark.parametrize(("N", "K"), [(9216, 6144), (6144, 9216), (6144, 8192)])
def test_real_size(format: Format, N: int, K: int, generator: torch.Generator) -> None:
    from minibble.runtime.kernels.linear4 import cuda

    q = random_matrix(N, K, format, generator)
    packed, weight = cuda.prepare([q], torch.bfloat16), decode(q).double()
    for M in (1, 2, 5, 8, 9, 16, 17, 300, 2048):
        x = torch.randn(M, K, device=generator.device, generator=generator).bfloat16()
        exact = x.double() @ weight.t()
        poison(x.device)
        first = packed(x, torch.bfloat16)
        assert relative(first, exact) < BOUND
        assert torch.equal(first, packed(x, torch.bfloat16)), "not the same twice"


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("rows", "K"), [((2064, 80), 6144), ((9216,), 1536), ((1024,), 8192)], ids=str)
def test_the_same_every_time(format: Format, rows: tuple[int, ...], K: int, generator: torch.Generator) -> None:
    """Weights in the L2 cache come soonest: not before the ring's place that they take has been read."""
    from minibble.runtime.kernels.linear4 import cuda

    packed = cuda.prepare([random_matrix(n, K, format, generator) for n in rows], torch.bfloat16)
    for M in (1, 3, 8, 16):
        x = torch.randn(M, K, device=generator.device, generator=generator).bfloat16()
        for dtype in (torch.bfloat16, torch.float32):
            first = packed(x, dtype)
            differing = torch.zeros((), dtype=torch.int64, device=x.device)
            for _ in range(200):
                differing += (packed(x, dtype) != first).any()
            assert not differing, f"{M} tokens, {dtype}: {int(differing)} of 200 differ"


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("experts", "active", "D", "F"), [(4, 2, 256, 512), (40, 3, 512, 48), (1, 1, 256, 256)])
def test_experts(format: Format, experts: int, active: int, D: int, F: int, generator: torch.Generator) -> None:
    from minibble.runtime.kernels.moe4.table import ExpertTable

    device = generator.device
    if F % format.block_size:
        F = 512
    table = ExpertTable.empty(experts, D, F, format, torch.bfloat16, device)
    assert table is not None
    exact = []
    for expert in range(experts):
        gate, up = (random_matrix(F, D, format, generator) for _ in range(2))
        down = random_matrix(D, F, format, generator)
        table.put(expert, "gate_up", [gate, up])
        table.put(expert, "down", [down])
        exact.append([decode(q).double() for q in (gate, up, down)])
    for M in TOKENS:
        x = torch.randn(M, D, device=device, generator=generator).bfloat16()
        ids = torch.rand(M, experts, device=device, generator=generator).topk(active).indices.int()
        weights = torch.rand(M, active, device=device, generator=generator)
        expected = torch.zeros(M, D, dtype=torch.float64, device=device)
        for expert, (gate64, up64, down64) in enumerate(exact):
            share = (weights * (ids == expert)).sum(1).double()
            hidden = torch.nn.functional.silu(x.double() @ gate64.t()) * (x.double() @ up64.t())
            expected += share[:, None] * (hidden @ down64.t())
        poison(device)
        # The hidden features are rounded as well.
        assert relative(table(x, ids, weights).double().sum(0), expected) < 1.5 * BOUND
        if M <= 64:
            parts = table.decode(x, ids, weights)
            assert relative(parts.sum(0), expected) < BOUND
            assert torch.equal(parts, table.decode(x, ids, weights)), "not the same twice"


def test_captured_in_a_graph(generator: torch.Generator) -> None:
    """Other tokens, other experts: a replay waits for nothing on the host."""
    from minibble.runtime.kernels.moe4.table import ExpertTable

    device, D, F = generator.device, 512, 1024
    table = ExpertTable.empty(8, D, F, NF4(), torch.bfloat16, device)
    assert table is not None
    for expert in range(8):
        table.put(expert, "gate_up", [random_matrix(F, D, NF4(), generator) for _ in range(2)])
        table.put(expert, "down", [random_matrix(D, F, NF4(), generator)])
    x = torch.randn(3, D, device=device, generator=generator).bfloat16()
    ids = torch.tensor([[0, 1], [2, 3], [0, 4]], dtype=torch.int32, device=device)
    weights = torch.rand(3, 2, device=device, generator=generator)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        table.decode(x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = table.decode(x, ids, weights)
    for _ in range(3):
        x.normal_(generator=generator)
        ids.copy_(torch.rand(3, 8, device=device, generator=generator).topk(2).indices)
        graph.replay()
        assert torch.equal(parts, table.decode(x, ids, weights))


def test_before_hopper(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sources compiled for compute capability 8.0 run here as PTX, without what Hopper alone has."""
    from minibble.runtime.kernels.linear4 import cuda, decoded, skinny, slices

    monkeypatch.setenv("MINIBBLE_CUDA_ARCH", "compute_80")
    caches = (nvrtc.architecture, nvrtc._module, skinny._kernel, slices._kernel, decoded._decode_kernel)
    for cache in caches:
        cache.cache_clear()
    try:
        for format in FORMATS:
            q = random_matrix(2064, 1536, format, generator)
            packed = cuda.prepare([q], torch.bfloat16)
            for M in (1, 5, 8, 16, 63, 300):
                x = torch.randn(M, 1536, device=generator.device, generator=generator).bfloat16()
                assert relative(packed(x, torch.bfloat16), x.double() @ decode(q).double().t()) < BOUND
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
