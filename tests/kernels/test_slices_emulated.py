"""The kernel of slices itself, compiled for the CPU with a stand-in for CUDA: `emulated/cuda.h`, `few.h`.

For Hopper, with its copy engine, and as before it, with copies by lanes. M tokens, N rows, K columns.
"""

from collections.abc import Iterator

import pytest
import torch
from golden import emulated
from golden.kernel_checks import relative

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.runtime.kernels.linear4 import slices
from minibble.runtime.kernels.tiles import CODES_NBYTES, TileLayout, pack

BLOCKS = 5  # multiprocessors of the GPU that there is not
SHARED_NBYTES = 232448  # of one of Hopper's

pytestmark = pytest.mark.skipif(not emulated.available(), reason="no C++ compiler")


@pytest.fixture(params=[900, 800], ids=["hopper", "before"], autouse=True)
def partial_sums(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Puts the CPU in the GPU's place; the sums that blocks hand over end as they began."""
    held, plain = torch.full((3 * 16 * 512,), -1, dtype=torch.int32), slices._kernel

    def kernel(*choices: int) -> emulated.FewTokens:
        return emulated.FewTokens(plain(*choices), request.param, tmp_path_factory.mktemp("kernel"))

    monkeypatch.setattr(slices, "_kernel", kernel)
    monkeypatch.setattr(slices, "multiprocessors", lambda device: BLOCKS)
    monkeypatch.setattr(slices, "WARPS", range(8, 17))
    monkeypatch.setattr(slices, "shared_limit", lambda device: SHARED_NBYTES)
    monkeypatch.setattr(slices, "partial_sums", lambda device: held)
    slices.shape_for.cache_clear()
    yield
    slices.shape_for.cache_clear()
    assert (held == -1).all()


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
        (Int4(64), 5, 4096),
    ],
    ids=str,
)
def test_products(format: Format, M: int, K: int) -> None:
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
    y = emulated.poisoned(M, 503, dtype=torch.bfloat16)
    slices.launch(layout, data, shape, x, y)
    assert relative(y, exact) < 3e-3
    sums = emulated.poisoned(shape.splits, M, 503)
    slices.launch(layout, data, shape, x, sums)
    assert relative(sums.sum(0), exact) < 1.5e-3


def test_nan_is_a_sum_like_others() -> None:
    """Where parts wait for each other, a NaN says that one has not come yet; here a row's sums are that very NaN."""
    generator = torch.Generator().manual_seed(0)
    q = NF4(double_quant=False).encode(torch.randn(64, 2048, generator=generator))
    layout = TileLayout.of([q])
    assert layout is not None
    data = pack([q], layout)
    data[CODES_NBYTES : CODES_NBYTES + 4] = 0xFF  # the scale of the first block
    x, y = torch.randn(3, 2048, generator=generator).bfloat16(), emulated.poisoned(3, 64, dtype=torch.bfloat16)
    shape = slices.shape_for(layout, 3, torch.device("cpu"))
    assert shape is not None and shape.splits == 2
    slices.launch(layout, data, shape, x, y)
    assert y[:, 0].isnan().all()
    assert relative(y[:, 1:], (x.double() @ decode(q).double().t())[:, 1:]) < 3e-3
