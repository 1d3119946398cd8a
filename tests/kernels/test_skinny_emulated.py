"""The kernel for few tokens itself, compiled for the CPU with a stand-in for CUDA: `emulated/cuda.h`, `few.h`.

For Hopper, with its copy engine, and as before it, with copies by lanes. M tokens, N rows, K columns, A active.
"""

from collections.abc import Iterator

import pytest
import torch
from golden import emulated
from golden.kernel_checks import relative
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.runtime.kernels.linear4 import skinny
from minibble.runtime.kernels.moe4.table import ExpertTable
from minibble.runtime.kernels.tiles import TileLayout, pack

BLOCKS = 3  # multiprocessors of the GPU that there is not
SHARED_NBYTES = 232448  # of one of Hopper's

Held = tuple[Tensor, Tensor, Tensor]  # gate, up and down of an expert, transposed, float64

pytestmark = pytest.mark.skipif(not emulated.available(), reason="no C++ compiler")


@pytest.fixture(params=[900, 800], ids=["hopper", "before"], autouse=True)
def emulated_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Puts the CPU in the GPU's place."""
    plain = skinny._kernel

    def kernel(*choices: int) -> emulated.FewTokens:
        return emulated.FewTokens(plain(*choices), request.param, tmp_path_factory.mktemp("kernel"))

    monkeypatch.setattr(skinny, "_kernel", kernel)
    monkeypatch.setattr(skinny, "multiprocessors", lambda device: BLOCKS)
    monkeypatch.setattr(skinny, "shared_limit", lambda device: SHARED_NBYTES)
    for kept in (skinny.splits_for, skinny.most_tokens):
        kept.cache_clear()
    yield
    for kept in (skinny.splits_for, skinny.most_tokens):
        kept.cache_clear()


@pytest.mark.parametrize(
    ("format", "M"),
    [
        (NF4(), 1),
        (NF4(), 7),
        (NF4(), 8),
        (NF4(double_quant=False), 3),
        (Int4(128), 2),
        (Int4(64), 9),
        (Int4(32), 1),
        (NF4(), 19),
        (Int4(128), 16),
    ],
    ids=str,
)
def test_products(format: Format, M: int) -> None:
    """Two parts, rows that fill no tile, and, where the layout can, columns that fill no chunk; whole and cut."""
    K = 1024 if isinstance(format, NF4) and format.double_quant else 640
    generator = torch.Generator().manual_seed(M)
    parts = [format.encode(torch.randn(rows, K, generator=generator)) for rows in (80, 23)]
    layout = TileLayout.of(parts)
    assert layout is not None
    operand = skinny.Operand(layout, pack(parts, layout))
    x = torch.randn(M, K, generator=generator).bfloat16()
    exact = x.double() @ torch.cat([decode(q) for q in parts]).double().t()
    y = emulated.poisoned(M, 103, dtype=torch.bfloat16)
    skinny.launch(operand, skinny.BFLOAT16, x, y)
    assert relative(y, exact) < 3e-3
    for splits in (1, 2, 3):
        sums = emulated.poisoned(splits, M, 103)
        skinny.launch(operand, skinny.PARTS, x, sums, splits=splits)
        assert relative(sums.sum(0), exact) < 1.5e-3


def some_experts(number: int, D: int, F: int, format: Format, seed: int) -> tuple[ExpertTable, list[Held]]:
    """Random ones in records, and beside them what these hold."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = TileLayout.make((F, F), D, format.levels, format.block_size, True, True)
    down = TileLayout.make((D,), F, format.levels, format.block_size, True)
    assert gate_up is not None and down is not None
    table, held = ExpertTable(number, gate_up, down, torch.device("cpu")), []
    for expert in range(number):
        gate, up = (format.encode(torch.randn(F, D, generator=generator) * D**-0.5) for _ in range(2))
        last = format.encode(torch.randn(D, F, generator=generator) * F**-0.5)
        table.put(expert, "gate_up", [gate, up])
        table.put(expert, "down", [last])
        held.append((decode(gate).double().t(), decode(up).double().t(), decode(last).double().t()))
    return table, held


def summed(held: list[Held], x: Tensor, ids: Tensor, weights: Tensor, first: Tensor | None = None) -> Tensor:
    """What the experts give, float64; of each only its `first` hidden units if they are given."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert, (gate, up, down) in enumerate(held):
        units = len(down) if first is None else int(first[expert])
        share = (weights * (ids == expert)).sum(1).double()
        hidden = torch.nn.functional.silu(x.double() @ gate) * (x.double() @ up)
        total += share[:, None] * (hidden[:, :units] @ down[:units])
    return total


@pytest.mark.parametrize(
    ("format", "M", "experts", "active"),
    [(NF4(), 1, 4, 2), (NF4(), 11, 3, 2), (NF4(), 20, 5, 2), (Int4(32), 3, 40, 3), (Int4(128), 6, 2, 1)],
    ids=str,
)
def test_experts(format: Format, M: int, experts: int, active: int) -> None:
    """Few pairs and many, more experts than a warp has lanes, more than 8 tokens of one expert, one expert each."""
    table, held = some_experts(experts, 256, 512, format, M)
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, 256, generator=generator).bfloat16()
    ids = torch.rand(M, experts, generator=generator).topk(active).indices.int()
    weights = torch.rand(M, active, generator=generator)
    assert relative(table.decode(x, ids, weights).sum(0), summed(held, x, ids, weights)) < 3e-3


@pytest.mark.parametrize(("format", "M", "experts"), [(NF4(), 1, 4), (Int4(64), 5, 6), (NF4(), 18, 40)], ids=str)
def test_experts_of_which_the_first_units_count(format: Format, M: int, experts: int) -> None:
    """One chunk of four for some of those that one token chose, two for others; nothing else of them is read."""
    D, F = 256, 1024
    table, held = some_experts(experts, D, F, format, M)
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, D, generator=generator).bfloat16()
    ids = torch.rand(M, experts, generator=generator).topk(2).indices.int()
    weights = torch.rand(M, 2, generator=generator)
    alone = torch.tensor([int((ids == expert).sum()) == 1 for expert in range(experts)])
    first = torch.where(alone, 256 * (1 + torch.arange(experts) % 2), F)
    assert alone[ids.long()].any()
    gate_up, down = table.gate_up, table.down
    for expert in alone.nonzero().flatten().tolist():  # codes and scales that would give NaN or nonsense
        record, units = table.record(expert), int(first[expert])
        record[units // 16 * gate_up.chunks * gate_up.chunk_nbytes : gate_up.meta_start] = 0xFF
        tiles = record[gate_up.nbytes :][: down.meta_start].view(down.tiles, down.chunks, down.chunk_nbytes)
        tiles[:, units // 256 :] = 0xFF
    found = table.read(table.addresses, x, ids, weights, first[ids.long()].int().contiguous()).sum(0)
    assert relative(found, summed(held, x, ids, weights, first)) < 3e-3


@pytest.mark.parametrize("M", [1, 5])
def test_an_expert_chosen_twice(M: int) -> None:
    """A job has more pairs than there are tokens."""
    table, held = some_experts(1, 256, 512, NF4(), M)
    generator = torch.Generator().manual_seed(M)
    x, ids = torch.randn(M, 256, generator=generator).bfloat16(), torch.zeros(M, 2, dtype=torch.int32)
    weights = torch.rand(M, 2, generator=generator)
    assert relative(table.decode(x, ids, weights).sum(0), summed(held, x, ids, weights)) < 3e-3


def test_tokens_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of little shared memory: four warps, and few tokens at a time."""
    monkeypatch.setattr(skinny, "shared_limit", lambda device: 75000)
    D, F, M = 1536, 256, 7
    gate_up, down = TileLayout.make((F, F), D, "nf4", 64, True, True), TileLayout.make((D,), F, "nf4", 64, True)
    assert gate_up is not None and down is not None
    most = skinny.most_tokens(gate_up, torch.device("cpu"), True, 2, 4)
    assert 1 <= most < M
    table, generator = ExpertTable(4, gate_up, down, torch.device("cpu")), torch.Generator().manual_seed(0)
    for expert in range(4):
        table.put(expert, "gate_up", [NF4().encode(torch.randn(F, D, generator=generator) / 39) for _ in range(2)])
        table.put(expert, "down", [NF4().encode(torch.randn(D, F, generator=generator) / 16)])
    x = torch.randn(M, D, generator=generator).bfloat16()
    ids = torch.rand(M, 4, generator=generator).topk(2).indices.int()
    weights = torch.rand(M, 2, generator=generator)
    whole = table.decode(x, ids, weights)
    assert whole.shape == (1, M, D)
    each = [table.decode(x[m : m + 1], ids[m : m + 1], weights[m : m + 1]).sum(0) for m in range(M)]
    torch.testing.assert_close(whole[0], torch.cat(each), rtol=1e-4, atol=1e-5)
