"""The arithmetic of 4-bit matrices: what codes stand for, and how NF4 finds them.

NF4 is that of QLoRA (Dettmers et al., 2023), sections 3.1 and 3.2: levels, the nearest of them, absmax and its double
quantization; every step rounds as in bitsandbytes. Decoding is the same for every table of levels.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod

import torch
from torch import Tensor

from minibble.quantize.parallel import spread
from minibble.quantize.tensors import NESTED_BLOCK, Levels, QuantizedTensor

# bitsandbytes' table, in float32 digits.
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

_CELLS = 240  # of the table in `nearest_levels`: a multiple of 15, for int4's edges to be exact
# Weights decoded at a time. 2**17 keep a CPU's work in its cache (6144 x 9216 on one thread: 160 ms, 220 in one
# piece); 2**26 are 256 MiB of float32 on a GPU.
_CHUNK_CPU = 1 << 17
_CHUNK_GPU = 1 << 26


@cache
def level_table(levels: Levels, device: torch.device | str = "cpu") -> Tensor:
    """What the 16 codes stand for, float32 [16]: NF4's levels in [-1, 1], or int4's -8 to 7."""
    table = CODEBOOK if levels == "nf4" else range(-8, 8)
    return torch.tensor(table, dtype=torch.float32, device=device)


def codebook(device: torch.device | str = "cpu") -> Tensor:
    """The 16 levels of NF4, float32 [16]."""
    return level_table("nf4", device)


def zero_byte(levels: Levels) -> int:
    """The byte of two codes whose level is 0."""
    return CODEBOOK.index(0.0) * 0x11 if levels == "nf4" else 0x88


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """bitsandbytes' signed 8-bit dynamic map, float32 [256], ascending.

    Source: 8-Bit Approximations for Parallelism in Deep Learning (Dettmers, 2016): seven decades below 1, each
    with twice as many fractions as the one before.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
            values += (sign * 10.0 ** (decade - 6) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def encode_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Double quantization of absmax, float32 [blocks]: (uint8 [blocks], float32 [ceil(blocks/256)], offset)."""
    offset = absmax.double().mean().float()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = padded.abs().amax(dim=1)
    scaled = (padded / nested.clamp(min=1e-38)[:, None]).reshape(-1)[: absmax.numel()]
    levels = dynamic_map(absmax.device)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes, nested, offset.item()


def decode_absmax(q: QuantizedTensor) -> Tensor:
    """The scale of each block, float32 [blocks]; a nested one in bitsandbytes' order of operations."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax.float()
    nested = q.nested_absmax.repeat_interleave(NESTED_BLOCK)[: q.absmax.numel()]
    return dynamic_map(q.device)[q.absmax.int()] * nested + q.nested_offset


def decode_rows(q: QuantizedTensor, rows: Tensor) -> Tensor:
    """Rows of `q` [N, K], int64 of any shape S: float32 [S, K]. K must be whole blocks."""
    K = q.shape[1]
    plain = q.absmax if q.nested_absmax is None else decode_absmax(q)
    absmax = plain.view(q.shape[0], -1)[rows].float()
    values = level_values(q.codes.view(-1, K // 2)[rows].reshape(-1), q.levels)
    blocks = values.reshape(*rows.shape, K // q.block_size, q.block_size)
    return (blocks * absmax[..., None]).reshape(*rows.shape, K)


def encode_blocks(part: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (two a byte) and absmax of consecutive blocks; the last block may be short."""
    blocks = part
    short = -blocks.numel() % block_size
    if short:
        blocks = torch.nn.functional.pad(blocks, (0, short))
    blocks = blocks.view(-1, block_size)
    absmax = _absmax(blocks)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)[: part.numel() + part.numel() % 2]
    return join_nibbles(nearest_levels(scaled, codebook(scaled.device))), absmax


def join_nibbles(codes: Tensor) -> Tensor:
    """Codes, uint8 [2 n], two a byte, the first in the high nibble: uint8 [n]."""
    pair = codes.view(torch.int16)  # little-endian: the first code is the low byte
    return ((pair << 4) | (pair >> 8)).to(torch.uint8)


def _absmax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each row, float32; the way that is quicker on the device, one pass or three, by tenfold."""
    if blocks.device.type == "cpu":
        return blocks.float().abs().amax(dim=1)
    return torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1).float()


def nearest_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each x, float32: uint8 of its shape; ties go to the lower level.

    `levels` float32, ascending, is a table that is made once: what is derived from it is kept.
    """
    if x.device.type != "cpu" or len(levels) > 16:
        return torch.bucketize(x, _bounds(levels), out_int32=True).to(torch.uint8)
    # A table of equal cells instead of a binary search, ten times as fast: the cell tells all bounds but one.
    below, inside, per_unit = _cells(levels)
    # Clamped again for NaN, for which any cell will do. One expression, so that nothing but the cells stays allocated.
    cell = (x - levels[0]).mul_(per_unit).clamp_(0, _CELLS).to(torch.int32).clamp_(0, _CELLS).reshape(-1)
    codes = below.index_select(0, cell)
    return codes.add_(torch.gt(x.reshape(-1), inside.index_select(0, cell)).view(torch.uint8)).view(x.shape)


@cache
def _bounds(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2


@cache
def _cells(levels: Tensor) -> tuple[Tensor, Tensor, float]:
    """For each cell of the levels' range: how many bounds lie below it, uint8, and the one inside it, float32 (infinite
    if none); and the cells in a unit.

    No cell holds two bounds, and none lies near a cell's edge or, for int4, exactly on it, where sums are exact: so
    rounding in finding the cell does no harm.
    """
    bounds, per_unit = _bounds(levels), _CELLS / float(levels[-1] - levels[0])
    cell = ((bounds - levels[0]) * per_unit).int()
    assert len(cell.unique()) == len(bounds), "two bounds in a cell"
    below = (cell[:, None] < torch.arange(_CELLS + 1)).sum(0).to(torch.uint8)
    return below, torch.full((_CELLS + 1,), float("inf")).scatter_(0, cell.long(), bounds), per_unit


def level_values(codes: Tensor, levels: Levels = "nf4") -> Tensor:
    """The levels that `codes`, uint8 [n], stand for, two a byte: float32 [2 n]."""
    return _pairs(levels, codes.device).index_select(0, codes.int()).view(torch.float32)


@cache
def _pairs(levels: Levels, device: torch.device) -> Tensor:
    """The two levels of each byte as one float64, [256]: a gather of 8 bytes is quicker than one of two 4s."""
    byte, table = torch.arange(256, device=device), level_table(levels, device)
    pairs = torch.stack((table[byte >> 4], table[byte & 0xF]), dim=1)
    return pairs.view(torch.float64).view(-1)


def decode(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [N, K] that `q` stands for: level times scale in float32, rounded once to `dtype`."""
    flat = torch.empty(prod(q.shape), dtype=dtype, device=q.device)

    def decode_chunk(chunk: tuple[int, QuantizedTensor]) -> None:
        start, part = chunk
        flat[start : start + prod(part.shape)] = _scaled(part)

    spread(decode_chunk, list(chunks(q)), q.device)
    return flat.view(q.shape)


def _scaled(q: QuantizedTensor) -> Tensor:
    """Level times scale of every weight, float32 [N*K]."""
    values, scales, n = level_values(q.codes, q.levels), decode_absmax(q), prod(q.shape)
    whole = n - n % q.block_size
    values[:whole].view(-1, q.block_size).mul_(scales[: whole // q.block_size, None])
    if whole < n:
        values[whole:].mul_(scales[-1])
    return values[:n]


def chunks(q: QuantizedTensor) -> Iterator[tuple[int, QuantizedTensor]]:
    """`q` as a row of matrices [1, n] that end at whole second-level blocks, with each one's first weight."""
    whole = q.block_size * NESTED_BLOCK
    size = _CHUNK_CPU if q.device.type == "cpu" else _CHUNK_GPU
    size = max(size - size % whole, whole)
    n = prod(q.shape)
    for start in range(0, n, size):
        stop = min(n, start + size)
        blocks = slice(start // q.block_size, -(-stop // q.block_size))
        nested = q.nested_absmax
        if nested is not None:
            nested = nested[blocks.start // NESTED_BLOCK : -(-blocks.stop // NESTED_BLOCK)]
        part = slice(start // 2, -(-stop // 2))
        yield (
            start,
            replace(q, shape=(1, stop - start), codes=q.codes[part], absmax=q.absmax[blocks], nested_absmax=nested),
        )
