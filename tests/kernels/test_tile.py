"""Products of many tokens from the kernel layout: the layout and the sharing of work on the CPU, the kernels on a GPU.

M tokens, N rows, K columns; E experts, A active, D hidden, F expert hidden.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from golden.kernel_checks import relative
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode, dynamic_map, level_table
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import decoded, tile
from minibble.runtime.kernels.tiles import TileLayout, pack

FORMATS = [NF4(), NF4(double_quant=False), Int4(32), Int4(64), Int4(128)]
# Several parts, tiles of 256 rows that are not full, rows that are no multiple of 8, and K that is no whole chunk.
SHAPES = [((1008, 768), (77, 768)), ((40, 512),), ((64, 384),), ((320, 2304),)]
TOKENS = [1, 2, 3, 7, 16, 17, 63, 64, 65, 300, 2048]
BOUND = 3e-3


def encoded(
    format: Format, shapes: tuple[tuple[int, int], ...], device: torch.device, seed: int = 0
) -> list[QuantizedTensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [format.encode(torch.randn(*shape, generator=generator, device=device) * 0.02) for shape in shapes]


def packed(parts: list[QuantizedTensor], interleaved: bool = False) -> tuple[TileLayout, Tensor]:
    layout = TileLayout.of(parts, interleaved)
    assert layout is not None
    return layout, pack(parts, layout)


def values(parts: list[QuantizedTensor]) -> Tensor:
    return torch.cat([decode(q) for q in parts])


def poison(device: torch.device) -> None:
    """Fill with NaN what the allocator hands out next."""
    for n in (1 << 12, 1 << 16, 1 << 20, 1 << 23):
        torch.full((n,), float("nan"), device=device)


def scale(data: Tensor, layout: TileLayout, tile_index: int, chunk: int, row: int, column: int) -> float:
    """As the kernels find it."""
    place = (tile_index * layout.chunks + chunk) * layout.chunk_nbytes + 4096
    entry = row * (256 // layout.scale_columns) + column // layout.scale_columns
    stored = data[place + entry * layout.scale_nbytes :][: layout.scale_nbytes]
    if layout.levels == "int4":
        return float(stored.view(torch.float16))
    if not layout.nested:
        return float(stored.view(torch.float32))
    meta = data[layout.meta_start + 8 * (2 * tile_index + row // 16) :][:8]
    block = int(meta[:4].view(torch.int32)) + row % 16 * (layout.K // 64) + chunk * 4
    nested = data[layout.nested_start + 4 * (block // 256) :][:4].view(torch.float32)
    return float(dynamic_map()[int(stored)] * nested + meta[4:].view(torch.float32))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_lanes_registers_hold_their_part_of_the_matrix(format: Format, interleaved: bool) -> None:
    """Random bytes of the layout, read as lane, step and register, are the weights that tensor cores expect there."""
    parts = encoded(format, ((96, 512), (96, 512)) if interleaved else ((80, 512), (33, 512)), torch.device("cpu"))
    layout, data = packed(parts, interleaved)
    W = values(parts)
    if interleaved:
        W = torch.stack([decode(q).view(6, 16, 512) for q in parts], dim=1).reshape(192, 512)
    levels = level_table(layout.levels)
    for place in torch.randint(0, layout.tiles_nbytes, (400,), generator=torch.Generator().manual_seed(0)).tolist():
        chunk_index, byte = divmod(place, layout.chunk_nbytes)
        if byte >= 4096:
            continue
        tile_index, chunk = divmod(chunk_index, layout.chunks)
        kb, rt, lane, s, i = byte // 1024, byte // 512 % 2, byte // 16 % 32, byte // 4 % 4, byte % 4
        row = 16 * rt + lane // 4 + 8 * (i & 1)
        column = 64 * kb + 16 * s + 2 * (lane % 4) + 8 * (i >> 1)
        if 32 * tile_index + row >= len(W):
            continue
        size = scale(data, layout, tile_index, chunk, row, column)
        got = [float(levels[code] * size) for code in (int(data[place]) >> 4, int(data[place]) & 15)]
        expected = W[32 * tile_index + row, 256 * chunk + column :][:2]
        assert torch.allclose(torch.tensor(got), expected, rtol=1e-6, atol=0)


def test_pairs_in_the_order_of_their_experts() -> None:
    ids = torch.tensor([[3, 1], [0, 3], [3, 0]])
    pairs, offsets = tile.sort_pairs(ids, 5)
    assert pairs.tolist() == [2, 5, 1, 0, 3, 4] and offsets.tolist() == [0, 2, 3, 3, 6, 6]


@pytest.mark.parametrize(("M", "tokens"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (129, 256), (5000, 256)])
def test_smallest_tile_that_holds_the_tokens(M: int, tokens: int) -> None:
    assert tile.tile_tokens(M) == tokens


HARNESS = """
#include <algorithm>
#include <cstdio>
#include <vector>
#define __device__
constexpr int CLUSTER = 1;
struct Dim { int x; } gridDim, blockIdx;
using std::max;
using std::min;
%s
int main() {
    for (int grid : {1, 7, 132})
        for (int tiles : {0, 1, 5, 36, 72, 131, 132, 133, 264, 265, 500})
            for (int blocks : {4, 8, 96}) {
                std::vector<int> done(tiles * blocks);
                gridDim.x = grid;
                for (int b = 0; b < grid; b++) {
                    blockIdx.x = b;
                    int handed_over = 0, last = 1 << 30;
                    for (Walk walk(tiles, blocks); walk.next();) {
                        for (int unit = walk.begin; unit < walk.end; unit++) done[walk.now * blocks + unit]++;
                        if (walk.begin >= walk.end) return printf("empty part");
                        if (walk.end < blocks && (handed_over++ || last != 1 << 30)) return printf("handed over late");
                        last = walk.now;
                        if (walk.begin == 0 || walk.end < blocks) continue;
                        int other = b - 1;  // every block down to that with the tile's first unit hands over its part
                        for (;; other--) {
                            if (other < 0 || walk.first_unit(other) == walk.first_unit(other + 1))
                                return printf("waits for nobody");
                            if (walk.first_unit(other) <= walk.now * blocks) break;
                        }
                    }
                }
                for (int n : done)
                    if (n != 1) return printf("%%d tiles of %%d on %%d: done %%d times", tiles, blocks, grid, n);
            }
    printf("ok");
}
"""


def test_blocks_share_all_units_and_wait_only_for_those_with_work(tmp_path: Path) -> None:
    """The kernel's own Walk, compiled for the CPU."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(tile.__file__).parent
    units = re.search(r"^constexpr int FINISH_UNITS = .*", (folder / "tile_shape.cuh").read_text(), re.MULTILINE)
    walk = re.search(r"^struct Walk \{.*?^\};", (folder / "tile_plan.cuh").read_text(), re.MULTILINE | re.DOTALL)
    assert units and walk
    (tmp_path / "walk.cpp").write_text(HARNESS % f"{units.group()}\n{walk.group()}")
    subprocess.run([compiler, "-std=c++17", "-o", tmp_path / "walk", tmp_path / "walk.cpp"], check=True)
    assert subprocess.run([tmp_path / "walk"], capture_output=True, text=True).stdout == "ok"


@pytest.fixture
def hopper(cuda_device: torch.device) -> torch.device:
    if not tile.available(cuda_device):
        pytest.skip("no Hopper GPU, or no cuda-bindings")
    return cuda_device


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [*SHAPES, ((9216, 6144),)], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_linear(hopper: torch.device, format: Format, shapes: tuple[tuple[int, int], ...]) -> None:
    parts = encoded(format, shapes, hopper)
    layout, data = packed(parts)
    W = values(parts).double()
    errors = []
    for M in TOKENS:
        x = torch.randn(M, layout.K, device=hopper, generator=torch.Generator(hopper).manual_seed(M)).bfloat16()
        expected = x.double() @ W.t()
        for dtype in (torch.float32, torch.bfloat16):
            poison(hopper)
            errors.append(relative(tile.linear(x, data, layout, dtype), expected))
    # The error of a few sums scatters by more than the bound leaves.
    assert max(errors) < (BOUND if layout.N > 64 else 4e-3) and sum(errors) / len(errors) < 2.5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("M", [20, 100, 300])
def test_factors(hopper: torch.device, M: int) -> None:
    parts = encoded(NF4(), ((1008, 768),), hopper)
    layout, data = packed(parts)
    x, factors = torch.randn(M, 768, device=hopper).bfloat16(), torch.rand(M, device=hopper) + 0.5
    poison(hopper)
    y = tile.linear(x, data, layout, factors=factors)
    assert relative(y, x.double() @ values(parts).double().t() * factors[:, None]) < BOUND


@pytest.mark.gpu
def test_sums_of_shared_tiles_do_not_vary(hopper: torch.device) -> None:
    layout, data = packed(encoded(NF4(), ((9216, 6144),), hopper))
    for M in (5, 100, 200, 777):
        x = torch.randn(M, 6144, device=hopper).bfloat16()
        first = tile.linear(x, data, layout)
        assert all(torch.equal(first, tile.linear(x, data, layout)) for _ in range(20))


@pytest.mark.gpu
def test_replayed_one_after_the_other(hopper: torch.device) -> None:
    """Kernels of a graph overlap: each waits for what the one ahead makes, and for the place of sums handed over."""
    layout, data = packed(encoded(NF4(), ((6144, 6144),), hopper))
    x = torch.randn(100, 6144, device=hopper).bfloat16()

    def chain() -> list[torch.Tensor]:
        made = [x]
        for _ in range(6):
            made.append(tile.linear(made[-1], data, layout))
        return made

    right = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(5):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("E", "A", "D", "F"), [(8, 2, 512, 768), (5, 3, 768, 1152)])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_experts(hopper: torch.device, format: Format, E: int, A: int, D: int, F: int) -> None:
    experts = [
        (encoded(format, ((F, D), (F, D)), hopper, 2 * e), encoded(format, ((D, F),), hopper, 2 * e + 1))
        for e in range(E)
    ]
    gate_up, down = packed(experts[0][0], interleaved=True)[0], packed(experts[0][1])[0]
    records = [torch.cat((packed(first, interleaved=True)[1], packed(last)[1])) for first, last in experts]
    table = torch.tensor([record.data_ptr() for record in records], device=hopper)
    for M in (1, 2, 7, 17, 64, 300, 1000):
        generator = torch.Generator(hopper).manual_seed(M)
        x = (torch.randn(M, D, device=hopper, generator=generator) * 5).bfloat16()
        ids = torch.rand(M, E, device=hopper, generator=generator).topk(A, dim=-1).indices
        if M == 64:  # experts without a token
            ids[:] = torch.arange(A, device=hopper)
        weights = torch.rand(M, A, device=hopper, generator=generator).softmax(-1)
        expected = torch.zeros(M, D, dtype=torch.float64, device=hopper)
        for e, (first, last) in enumerate(experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            gate, up = (x[token].double() @ decode(q).double().t() for q in first)
            y = (torch.nn.functional.silu(gate) * up) @ values(last).double().t()
            expected.index_add_(0, token, y * weights[token, slot][:, None].double())
        poison(hopper)
        # Hidden units and products are rounded to bfloat16, by 1.7e-3 each: together 2.4e-3.
        y = tile.experts(x, ids, weights, table, gate_up, down, gate_up.nbytes)
        assert y.shape == (A, M, D) and relative(y.double().sum(0), expected) < BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_decoded_tiles(cuda_device: torch.device, format: Format, shapes: tuple[tuple[int, int], ...]) -> None:
    """To the bits of the reference; and in slices for cuBLAS."""
    parts = encoded(format, shapes, cuda_device)
    layout, data = packed(parts)
    W = values(parts)
    poison(cuda_device)
    assert torch.equal(decoded.decode_tiles(data, layout), W.bfloat16())
    assert torch.equal(decoded.decode_tiles(data, layout, (32, layout.N)), W[32:].bfloat16())
    x = torch.randn(65, layout.K, device=cuda_device).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        y = decoded.linear_decoded(x, data, layout, dtype, slice_nbytes=1 << 20)
        assert y.dtype == dtype and relative(y, x.double() @ W.double().t()) < BOUND
