"""Scales as files hold them: the search for them, and the grids that they must lie on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minibble.calibrate.scales import DoubleQuantizedGrid, Float16Grid, Float32Grid, Grid, grid_for
from minibble.calibrate.solver import SHARES
from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode_absmax, dynamic_map, level_table, nearest_levels
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.feedback import inverse, search_scales

FORMATS: list[Format] = [NF4(), NF4(double_quant=False), Int4(64)]
ids = [format.name for format in FORMATS]


def scales(B: int = 2, G: int = 5, N: int = 130, seed: int = 0) -> Tensor:
    """Positive scales [B, G, N] over three decades; 650 of a matrix are three second-level blocks, the last short."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, G, N, generator=generator).pow(3) + 1e-3


def square_error(W: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    """Of nearest rounding, float64 [B, G, N]."""
    groups = W.unflatten(1, (-1, group))
    codes = nearest_levels(groups * inverse(scale)[:, :, None], levels).int()
    return (groups.double() - levels.double()[codes] * scale[:, :, None].double()).square().sum(dim=2)


@pytest.mark.parametrize(("format", "share", "error"), [(NF4(), 0.9, 0.0073), (Int4(128), 0.9, 0.0102)])
def test_the_search_beats_the_plain_absmax_in_every_group(format: Format, share: float, error: float) -> None:
    """On normal weights; the mean errors are those known of both formats, and most groups gain."""
    W = torch.randn(1, 512, 100, generator=torch.Generator().manual_seed(1))
    levels, group = level_table(format.levels), format.block_size
    whole = W.unflatten(1, (-1, group)).abs().amax(dim=2) / levels.abs().max()
    found = search_scales(W, levels, group, SHARES)
    ours, plain = square_error(W, found, levels, group), square_error(W, whole, levels, group)
    assert bool((ours <= plain * (1 + 1e-6)).all())
    assert float((ours < 0.999 * plain).double().mean()) > share
    assert float(ours.sum() / W.square().sum()) == pytest.approx(error, rel=0.03)


def grids(scale: Tensor, parts: list[int]) -> list[Grid]:
    return [grid_for(format, scale, parts) for format in FORMATS]


def test_which_grid_belongs_to_a_format() -> None:
    kinds = [type(grid) for grid in grids(scales(), [130])]
    assert kinds == [DoubleQuantizedGrid, Float32Grid, Float16Grid]


def on_grid(grid: Grid, wished: Tensor) -> Tensor:
    """All groups, [B, G, N]."""
    return torch.stack([grid.nearest(wished[:, group], group) for group in range(wished.shape[1])], dim=1)


@pytest.mark.parametrize("which", range(3), ids=ids)
def test_nearest_is_nearest_and_stays(which: int) -> None:
    """What is stored is a fixed point; no other storable value is nearer to what was wished."""
    wished = scales()
    grid = grids(wished, [50, 80])[which]
    found = on_grid(grid, wished)
    assert torch.equal(on_grid(grid, found), found)
    shifted = wished * torch.linspace(0.5, 1.5, wished.shape[2])
    found = on_grid(grid, shifted)
    distance = (found.double() - shifted.double()).abs()
    if isinstance(grid, DoubleQuantizedGrid):
        every = dynamic_map() * grid.nested_BGN[..., None] + grid.offset_BN[:, None, :, None]
        least = (every.double() - shifted.double()[..., None]).abs().amin(dim=-1)
        assert bool((distance <= least * (1 + 1e-3) + 1e-7).all())
    elif isinstance(grid, Float16Grid):
        halves = found.half()
        for way in (0.0, float("inf")):
            other = torch.nextafter(halves, torch.full_like(halves, way)).double()
            assert bool((distance <= (other - shifted.double()).abs()).all())
    else:
        assert torch.equal(found, shifted)


def decoded(grid: Grid, format: Format, scale: Tensor, b: int, rows: slice) -> Tensor:
    """The scales of some rows after a way through a file, [G, rows]."""
    absmax, nested, offset = grid.stored(scale, b, rows)
    count, G = rows.stop - rows.start, scale.shape[1]
    codes = torch.zeros(count * G * 32, dtype=torch.uint8)
    q = QuantizedTensor((count, G * 64), codes, absmax, nested, offset, 64, torch.bfloat16, format.levels)
    return decode_absmax(q).view(count, G).t()


@pytest.mark.parametrize("which", range(3), ids=ids)
def test_files_hold_just_these_scales(which: int) -> None:
    """Bit by bit, for matrices that lie one under the other, also after scales have moved along the grid."""
    first = scales()
    grid = grids(first, [50, 79, 1])[which]
    for wished in (first, first * 1.3, first.flip(2)):
        found = on_grid(grid, wished)
        for b in range(2):
            for rows in (slice(0, 50), slice(50, 129), slice(129, 130)):
                assert torch.equal(decoded(grid, FORMATS[which], found, b, rows), found[b, :, rows])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(-30, 10),
    st.integers(-8, 0),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_double_quantized_scales_of_any_size(
    G: int, N: int, exponent: int, spread: int, seed: int, zeros: bool
) -> None:
    """Tiny ones, huge ones, ones that hardly differ beside their mean, and groups of zeros."""
    generator = torch.Generator().manual_seed(seed)
    wished = 10.0**exponent * (1 + 10.0**spread * torch.rand(1, G, N, generator=generator))
    if zeros:
        wished[torch.rand(1, G, N, generator=generator) < 0.3] = 0
    grid = DoubleQuantizedGrid.of(wished, [N])
    found = on_grid(grid, wished)
    assert torch.equal(decoded(grid, NF4(), found, 0, slice(0, N)), found[0])
    assert torch.equal(on_grid(grid, found), found)
    assert float((found - wished).abs().max()) <= 0.02 * float(wished.max())


def test_a_grid_is_that_of_the_format() -> None:
    """Scales that the format itself has encoded lie on the grid already."""
    W = torch.randn(24, 320, generator=torch.Generator().manual_seed(2))
    q = NF4().encode(W)
    whole = W.view(24, 5, 64).abs().amax(dim=2)
    grid = DoubleQuantizedGrid.of(whole.t()[None], [24])
    absmax, nested, offset = grid.stored(on_grid(grid, whole.t()[None].contiguous()), 0, slice(0, 24))
    assert nested is not None and q.nested_absmax is not None
    assert torch.equal(absmax, q.absmax) and torch.equal(nested, q.nested_absmax) and offset == q.nested_offset


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-3, 1.0, 1e5])
def test_int4_scales_stay_positive_and_finite(size: float) -> None:
    found = Float16Grid().nearest(torch.tensor([[-size, 0.0, size]]), 0)
    assert bool((found > 0).all()) and bool(torch.isfinite(found).all()) and torch.equal(found.half().float(), found)


@pytest.mark.parametrize(
    ("format", "size"),
    [(format, size) for format in (NF4(), Int4(64)) for size in (1e-2, 1e-4, 1e-6)],
)
def test_small_weights_are_not_lost(format: Format, size: float) -> None:
    """Scales on the grid round small weights about as well as the format's own nearest rounding does."""
    W = size * torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    levels, columns = level_table(format.levels), W.t()[None].contiguous()
    found = search_scales(columns, levels, 64, SHARES)
    found = on_grid(grid_for(format, found, [16]), found)
    ours = float(square_error(columns, found, levels, 64).sum())
    theirs = float((W.double() - format.decode(format.encode(W)).double()).square().sum())
    assert ours < 1.1 * theirs, np.array([ours, theirs]) / float(W.square().sum())
