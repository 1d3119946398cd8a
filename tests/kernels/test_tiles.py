"""The kernels' layout of 4-bit matrices, read back byte by byte as docs/adr/0009-kernel-layout.md describes it."""

import pytest
import torch
from golden.tiles_by_byte import read_back
from hypothesis import given, settings
from hypothesis import strategies as st

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import CODEBOOK, decode
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels import tiles
from minibble.runtime.kernels.tiles import TileLayout, byte_levels, kernel_levels, level_scale, pack

FORMATS = [NF4(), NF4(double_quant=False), Int4(128), Int4(64), Int4(32), Int4(256)]


def quantized(rows: tuple[int, ...], K: int, format: Format, seed: int = 0) -> list[QuantizedTensor]:
    generator = torch.Generator().manual_seed(seed)
    return [format.encode(torch.randn(n, K, generator=generator)) for n in rows]


def padded_rows(parts: list[QuantizedTensor], interleaved: bool) -> torch.Tensor:
    """What the tiles should hold, rows of zeros where a part ends within 16."""
    padded = [torch.nn.functional.pad(m, (0, 0, 0, -len(m) % 16)) for m in map(decode, parts)]
    if interleaved:
        return torch.stack([m.view(-1, 16, m.shape[1]) for m in padded], dim=1).flatten(0, 2)
    return torch.cat(padded)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("rows", "K", "interleaved"),
    [((32,), 256, False), ((16, 48, 5), 512, False), ((32, 32), 256, True), ((7,), 768, False)],
)
def test_every_weight_is_in_its_place(format: Format, rows: tuple[int, ...], K: int, interleaved: bool) -> None:
    parts = quantized(rows, K, format)
    layout = TileLayout.of(parts, interleaved)
    assert layout is not None
    found = read_back(bytes(pack(parts, layout).tolist()), layout)
    expected = padded_rows(parts, interleaved)
    torch.testing.assert_close(found[: len(expected), :K], expected, rtol=1e-6, atol=1e-7)
    assert not found[len(expected) :].any() and not found[:, K:].any()


@pytest.mark.parametrize("format", [NF4(), NF4(double_quant=False), Int4(32), Int4(64)], ids=str)
@pytest.mark.parametrize("K", [64, 192, 320])
def test_widths_that_are_no_whole_chunks(format: Format, K: int) -> None:
    """Their second-level scales would change within a chunk, so scales are held in float32."""
    parts = quantized((16,), K, format)
    layout = TileLayout.of(parts)
    assert layout is not None and not layout.nested
    found = read_back(bytes(pack(parts, layout).tolist()), layout)
    torch.testing.assert_close(found[:16, :K], decode(parts[0]), rtol=1e-6, atol=1e-7)
    assert not found[:, K:].any()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=3), chunks=st.integers(1, 3), double=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_sizes(rows: list[int], chunks: int, double: bool, seed: int) -> None:
    """Nothing beyond the codes and scales but 8 bytes for every 16 rows, and alignment."""
    parts = quantized(tuple(16 * n for n in rows), 256 * chunks, NF4(double_quant=double), seed)
    layout = TileLayout.of(parts)
    assert layout is not None
    data = pack(parts, layout)
    assert data.shape == (layout.nbytes,) and layout.nbytes % 256 == 0
    padding = 16 * (sum(rows) % 2) * layout.K // 64 * (32 + layout.scale_nbytes)
    stored = sum(q.nbytes for q in parts) + padding
    assert stored <= layout.nbytes < stored + 8 * 2 * layout.tiles + 3 * 256 + 8 * len(rows)


def test_an_expert_of_the_real_size_takes_what_its_file_does() -> None:
    gate_up = TileLayout.make((9216, 9216), 6144, "nf4", 64, True, True)
    down = TileLayout.make((6144,), 9216, "nf4", 64, True)
    assert gate_up is not None and down is not None
    stored = 3 * NF4().held_nbytes((9216, 6144))
    assert 1 <= (gate_up.nbytes + down.nbytes) / stored < 1.0003


@pytest.mark.parametrize(
    ("rows", "K", "block", "interleaved"),
    [((20, 16), 256, 64, False), ((20, 20), 256, 64, True), ((16,), 100, 64, False), ((16,), 256, 128, False)],
)
def test_shapes_that_it_cannot_hold(rows: tuple[int, ...], K: int, block: int, interleaved: bool) -> None:
    assert TileLayout.make(rows, K, "nf4", block, True, interleaved) is None


def test_groups_that_it_cannot_hold() -> None:
    assert TileLayout.make((16,), 192, "int4", 48, False) is None
    assert TileLayout.make((16,), 512, "int4", 16, False) is None


def test_kernel_levels_are_bfloat16_and_near() -> None:
    for name in ("nf4", "int4"):
        levels = kernel_levels(name)
        assert torch.equal(levels, levels.bfloat16().float())
    assert torch.equal(kernel_levels("int4"), torch.arange(-8.0, 8.0)) and level_scale("int4") == 1
    near = kernel_levels("nf4") / level_scale("nf4")
    exact = torch.tensor(CODEBOOK)
    assert (near - exact).norm() / exact.norm() < 1.2e-3
    assert near[7] == 0 and float((near - exact).abs().max()) < 2e-3


def test_byte_levels() -> None:
    table = byte_levels("nf4", torch.device("cpu")).view(torch.bfloat16).view(256, 2).float()
    levels = kernel_levels("nf4")
    assert table[0x2F].tolist() == [levels[2], levels[15]] and table[0xF0].tolist() == [levels[15], levels[0]]
    halves = byte_levels("nf4", torch.device("cpu"), torch.float16).view(torch.float16).view(256, 2).float()
    assert torch.equal(halves[0x2F], torch.tensor(CODEBOOK)[[2, 15]].half().float())


def test_out_of_given_memory() -> None:
    parts = quantized((32,), 256, NF4())
    layout = TileLayout.of(parts)
    assert layout is not None
    room = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    assert pack(parts, layout, room).data_ptr() == room.data_ptr()
    assert torch.equal(room[: tiles.CODES_NBYTES], pack(parts, layout)[: tiles.CODES_NBYTES])
