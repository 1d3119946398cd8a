"""The tensor cores' kernel itself, compiled for the CPU with a stand-in for CUDA: `emulated/cuda.h`.

Barriers, copies and products happen as late and in as mixed an order as the hardware allows, so that what is read too
early, freed too early or never written shows here too. M tokens, N rows, K columns; E experts, A active.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import emulated
from golden.kernel_checks import relative
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.runtime.kernels.linear4 import tile
from minibble.runtime.kernels.tiles import HALF_SCALE, TileLayout, pack

BLOCKS = 4  # multiprocessors of the GPU that there is not: few, so that tiles are shared and blocks make several
REPLACED = ("numbers.cuh", "ptx.cuh", "wgmma.cuh")
SHARED = "extern __shared__ __align__(1024) u8 shared[];"

pytestmark = pytest.mark.skipif(not emulated.available(), reason="no C++ compiler")


class Emulated:
    """A kernel as `nvrtc.Kernel`, but for the CPU."""

    def __init__(self, sources: tuple[Path, ...], macros: tuple[str, ...], folder: Path):
        self.sources, self.macros, self.folder = sources, macros, folder

    def launch(
        self, grid: int, threads: int, arguments: list[Any], shared_nbytes: int, overlap: bool, cluster: int
    ) -> None:
        library = emulated.library(
            self.sources, self.macros, self.folder, replaced=REPLACED, shared=SHARED, entry="tile.cpp"
        )
        x_map, problem = map(ctypes.byref, arguments)
        library.launch(grid, cluster, next(emulated.SEEDS), x_map, problem)


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tensor]:
    """Puts the CPU in the GPU's place; yields the flags that blocks raise, which end as they began."""
    partials, flags = torch.full((BLOCKS * 256 * 128,), float("nan")), torch.zeros(4 * BLOCKS, dtype=torch.int32)
    compiled = tile._compiled.__wrapped__

    def compiled_for_cpu(*arguments: Any) -> Emulated:
        kernel = compiled(*arguments)
        return Emulated(kernel.sources, kernel.macros, tmp_path_factory.mktemp("kernel"))

    def tensor_map(address: int, rows: int, columns: int, box: int) -> tile._TensorMap:
        made = tile._TensorMap()
        made.words[:4] = address, rows, columns, box
        return made

    monkeypatch.setattr(tile, "_kernel", tile._kernel.__wrapped__)
    monkeypatch.setattr(tile, "_compiled", compiled_for_cpu)
    monkeypatch.setattr(tile, "_tensor_map", tensor_map)
    monkeypatch.setattr(tile, "multiprocessors", lambda device: BLOCKS)
    monkeypatch.setattr(tile, "_workspace", lambda device: (partials, flags))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield flags
    assert not flags.any()


def half_rows(x: Tensor, rows: Tensor | None = None, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As halves.half_rows, without its kernel."""
    x = x if rows is None else x[rows]
    up = torch.exp2(14 - x.float().abs().amax(1).log2().floor())
    return (x.float() * up[:, None]).half(), (1 if weights is None else weights) / up / HALF_SCALE


@pytest.mark.parametrize(
    ("format", "M", "dtype"),
    [
        (NF4(), 5, torch.bfloat16),
        (NF4(), 100, torch.bfloat16),
        (NF4(), 300, torch.bfloat16),  # a whole tile, and one of which half is left out
        (NF4(double_quant=False), 300, torch.float32),
        (Int4(32), 17, torch.float32),
        (Int4(64), 40, torch.bfloat16),
        (Int4(128), 250, torch.bfloat16),
    ],
    ids=str,
)
def test_linear(flags: Tensor, format: Format, M: int, dtype: torch.dtype) -> None:
    """Two parts, rows that are no multiple of 8, and columns that are no multiple of 256."""
    generator = torch.Generator().manual_seed(M)
    K = 512 if isinstance(format, NF4) and format.double_quant else 384
    parts = [format.encode(torch.randn(rows, K, generator=generator) * 0.02) for rows in (272, 77)]
    layout = TileLayout.of(parts)
    assert layout is not None
    data, W = pack(parts, layout), torch.cat([decode(q) for q in parts]).double()
    x = torch.randn(M, K, generator=generator).bfloat16()
    y = tile.linear(x, data, layout, dtype)
    assert y.dtype == dtype and relative(y, x.double() @ W.t()) < 3e-3


def test_sums_that_come_before_a_block_begins(flags: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles of 24 units for five clusters. Of the second tile, the cluster with the last columns has 10 units of
    the third to do first, and that with the first columns, which has some of the first tile too, only 5 of these."""
    partials, more_flags = torch.full((10 * 256 * 128,), float("nan")), torch.zeros(40, dtype=torch.int32)
    monkeypatch.setattr(tile, "multiprocessors", lambda device: 10)
    monkeypatch.setattr(tile, "_workspace", lambda device: (partials, more_flags))
    generator = torch.Generator().manual_seed(0)
    q = Int4(128).encode(torch.randn(250, 1536, generator=generator) * 0.02)
    layout = TileLayout.of([q])
    assert layout is not None
    x = torch.randn(520, 1536, generator=generator).bfloat16()
    y = tile.linear(x, pack([q], layout), layout)
    assert relative(y, x.double() @ decode(q).double().t()) < 3e-3 and not more_flags.any()


@pytest.mark.parametrize("M", [20, 300])
def test_factors(flags: Tensor, M: int) -> None:
    generator = torch.Generator().manual_seed(M)
    q = NF4().encode(torch.randn(77, 512, generator=generator) * 0.02)
    layout = TileLayout.of([q])
    assert layout is not None
    x = torch.randn(M, 512, generator=generator).bfloat16()
    factors = torch.rand(M, generator=generator) + 0.5
    y = tile.linear(x, pack([q], layout), layout, factors=factors)
    assert relative(y, x.double() @ decode(q).double().t() * factors[:, None]) < 3e-3


@pytest.mark.parametrize("M", [7, 100, 400])
def test_experts(flags: Tensor, monkeypatch: pytest.MonkeyPatch, M: int) -> None:
    """Each product of its own inputs; the last expert has no token."""
    E, A, D, F = 5, 2, 256, 384
    generator = torch.Generator().manual_seed(M)

    def encoded(rows: int, columns: int) -> Any:
        return NF4().encode(torch.randn(rows, columns, generator=generator) * 0.05)

    held = [(encoded(F, D), encoded(F, D), encoded(D, F)) for _ in range(E)]
    gate_up, down = TileLayout.of(held[0][:2], True), TileLayout.of(held[0][2:])
    assert gate_up is not None and down is not None
    records = [torch.cat((pack(e[:2], gate_up), pack(e[2:], down))) for e in held]
    table = torch.tensor([record.data_ptr() for record in records])
    x = (torch.randn(M, D, generator=generator) * 3).bfloat16()
    ids = torch.rand(M, E - 1, generator=generator).topk(A, dim=-1).indices
    weights = torch.rand(M, A, generator=generator).softmax(-1)

    pairs, offsets = tile.sort_pairs(ids, E)
    x_PD = x[pairs // A]
    h = tile.grouped(*half_rows(x_PD), table, gate_up, offsets, silu=True)
    halves, factors = half_rows(h, weights=weights.view(-1)[pairs])
    y = tile.grouped(halves, factors, table, down, offsets, start=gate_up.nbytes, rows=pairs)
    h_expected, y_expected = torch.empty(h.shape, dtype=torch.float64), torch.empty(y.shape, dtype=torch.float64)
    for e, (w1, w3, w2) in enumerate(held):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        gate, up, last = (decode(q).double().t() for q in (w1, w3, w2))
        h_expected[rows] = torch.nn.functional.silu(x_PD[rows].double() @ gate) * (x_PD[rows].double() @ up)
        y_expected[pairs[rows]] = h[rows].double() @ last
    y_expected *= weights.view(-1, 1).double()
    # What rounding to bfloat16 gives, 1.7e-3, and little more.
    assert relative(h, h_expected) < 1.9e-3 and relative(y, y_expected) < 1.9e-3
    monkeypatch.setattr("minibble.runtime.kernels.linear4.halves.half_rows", half_rows)
    z = tile.experts(x, ids, weights, table, gate_up, down, gate_up.nbytes)
    assert relative(z, y_expected.view(M, A, D).transpose(0, 1)) < 1.9e-3
