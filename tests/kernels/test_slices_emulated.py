"""The kernel of slices itself, compiled for the CPU with a stand-in for CUDA: `emulated/cuda.h`, `skinny.h`.

For Hopper, with its copy engine, and as before it, with copies by lanes. M tokens, N rows, K columns.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import emulated
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.runtime.kernels.linear4 import skinny, slices
from minibble.runtime.kernels.tiles import TileLayout, pack

BLOCKS = 5  # multiprocessors of the GPU that there is not
SHARED_NBYTES = 232448  # of one of Hopper's

pytestmark = pytest.mark.skipif(not emulated.available(), reason="no C++ compiler")


class Emulated:
    """A kernel as `nvrtc.Kernel`, but for the CPU."""

    def __init__(self, macros: tuple[str, ...], folder: Path):
        self.macros, self.folder = macros, folder

    def launch(
        self, grid: int, threads: int, arguments: list[Any], shared_nbytes: int, overlap: bool = False
    ) -> None:  # fmt: skip
        sources = [Path(slices.__file__).with_name(name) for name in slices.SOURCES]
        library = emulated.library(
            sources, self.macros, self.folder, replaced=("skinny_ptx.cuh",),
            shared="extern __shared__ __align__(1024) char shared[];", headers=("cuda.h", "skinny.h"),
            entry="slices.cpp",
        )  # fmt: skip
        library.launch(grid, next(emulated.SEEDS), ctypes.byref(arguments[0]))


@pytest.fixture(params=[900, 800], ids=["hopper", "before"])
def partial_sums(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tensor]:
    """Puts the CPU in the GPU's place; yields the sums that blocks hand over, which end as they began."""
    held = torch.full((8 * 16 * 640,), -1, dtype=torch.int32)

    def kernel(warps: int, scale_kind: int, scale_columns: int, tokens: int, table_stride: int, slots: int) -> Emulated:
        macros = {
            "WARPS": warps, "TOKENS": tokens, "TABLE_STRIDE": table_stride,
            "SCALE_KIND": scale_kind, "SCALE_COLUMNS": scale_columns, "SLOTS": slots,
        }  # fmt: skip
        flags = tuple(f"-D{name}={value}" for name, value in macros.items())
        return Emulated((*flags, f"-D__CUDA_ARCH__={request.param}"), tmp_path_factory.mktemp("kernel"))

    monkeypatch.setattr(slices, "_kernel", kernel)
    monkeypatch.setattr(slices, "multiprocessors", lambda device: BLOCKS)
    monkeypatch.setattr(slices, "WARPS", range(8, 17))
    monkeypatch.setattr(slices, "shared_limit", lambda device: SHARED_NBYTES)
    monkeypatch.setattr(skinny, "partial_sums", lambda device: held)
    slices.shape_for.cache_clear()
    yield held
    slices.shape_for.cache_clear()
    assert (held == -1).all()


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize(
    ("format", "M", "K"),
    [
        (NF4(), 1, 1024),
        (NF4(), 7, 2048),
        (NF4(), 16, 3072),
        (NF4(double_quant=False), 3, 2304),
        (NF4(double_quant=False), 12, 1152),
        (Int4(128), 2, 2048),
        (Int4(64), 9, 1280),
        (Int4(32), 8, 1152),
        (Int4(128), 16, 3072),
    ],
    ids=str,
)
def test_products(partial_sums: Tensor, format: Format, M: int, K: int) -> None:
    """Two parts, rows that fill no tile, and columns that fill no chunk; whole and cut; more tiles than buffers."""
    generator = torch.Generator().manual_seed(M)
    parts = [format.encode(torch.randn(rows, K, generator=generator)) for rows in (400, 103)]
    layout = TileLayout.of(parts)
    assert layout is not None
    data = pack(parts, layout)
    x = torch.randn(M, K, generator=generator).bfloat16()
    exact = x.double() @ torch.cat([decode(q) for q in parts]).double().t()
    shape = slices.shape_for(layout, M, torch.device("cpu"))
    assert shape is not None
    y = poisoned(M, 503, dtype=torch.bfloat16)
    slices.launch(layout, data, shape, x, y)
    assert relative(y, exact) < 3e-3
    sums = poisoned(shape.splits, M, 503)
    slices.launch(layout, data, shape, x, sums)
    assert relative(sums.sum(0), exact) < 1.5e-3
