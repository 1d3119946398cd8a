"""NF4: 4-bit codes on the quantiles of a normal distribution, one absmax per block of 64 weights.

Paper: QLoRA (Dettmers et al., 2023), sections 3.1 and 3.2 (double quantization). Codes, scales and serialization
are bitsandbytes' own: every tensor written here is decoded by bitsandbytes to the same bits.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.parallel import spread
from minibble.quantize.tensors import NESTED_BLOCK, QuantizedTensor

# bitsandbytes' table, in float32 digits.
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

# The JSON beside each matrix is padded with spaces to this length, so that sizes are known beforehand.
STATE_NBYTES = 192
_STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CELLS = 64  # cells of the table in `nearest_levels`
_CHUNK_CPU = 1 << 18  # weights a thread encodes at a time
_CHUNK_GPU = 1 << 24  # weights: 64 MiB of float32 work


@cache
def codebook(device: torch.device | str = "cpu") -> Tensor:
    """The 16 levels, float32 [16]."""
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


@cache
def _bounds(device: torch.device | str) -> Tensor:
    levels = codebook(device)
    return (levels[:-1] + levels[1:]) / 2


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


@dataclass(frozen=True)
class NF4:
    """The format: how NF4 matrices are encoded, decoded, packed, and how many bytes they take."""

    block_size: int = 64
    double_quant: bool = True

    @property
    def name(self) -> str:
        return "nf4-dq" if self.double_quant else "nf4"

    def encode(self, weight: Tensor) -> QuantizedTensor:
        """Round `weight` [N, K] (any float dtype, any device) to the nearest level of its blocks."""
        if weight.ndim != 2:
            raise CheckpointError(f"only matrices become NF4, found shape {tuple(weight.shape)}")
        flat = weight.reshape(-1)
        codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-flat.numel() // self.block_size), device=weight.device)

        def encode_from(start: int) -> None:
            part = flat[start : start + chunk]
            codes_part, absmax_part = _encode_blocks(part, self.block_size)
            codes[start // 2 : start // 2 + codes_part.numel()] = codes_part
            block = start // self.block_size
            absmax[block : block + absmax_part.numel()] = absmax_part

        chunk = _CHUNK_CPU if weight.device.type == "cpu" else _CHUNK_GPU
        spread(encode_from, range(0, flat.numel(), chunk), weight.device)
        shape = (weight.shape[0], weight.shape[1])
        if not self.double_quant:
            return QuantizedTensor(shape, codes, absmax, None, None, self.block_size, weight.dtype)
        return QuantizedTensor(shape, codes, *encode_absmax(absmax), self.block_size, weight.dtype)

    def decode(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that `q` stands for, rounded once from float32 to `dtype`."""
        return _scaled(level_values(q.codes), decode_absmax(q), q).to(dtype).reshape(q.shape)

    def stored(
        self, name: str, shape: tuple[int, ...], source_dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor that `pack` writes for the matrix `name` of `shape` [N, K]."""
        n = prod(shape)
        blocks = -(-n // self.block_size)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (torch.uint8, (-(-n // 2), 1)),
            f"{name}.absmax": (torch.uint8 if self.double_quant else torch.float32, (blocks,)),
            f"{name}.quant_map": (torch.float32, (16,)),
            f"{name}.{_STATE}": (torch.uint8, (STATE_NBYTES,)),
        }
        if self.double_quant:
            layout[f"{name}.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
            layout[f"{name}.nested_quant_map"] = (torch.float32, (256,))
        return layout

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of one matrix [N, K] on disk, its tables and JSON included."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.stored("", shape).values())

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors under which bitsandbytes stores `q` as the parameter `name`."""
        tensors = {
            name: q.codes.reshape(-1, 1),
            f"{name}.absmax": q.absmax,
            f"{name}.quant_map": codebook().clone(),
            f"{name}.{_STATE}": _state_json(q),
        }
        if q.nested_absmax is not None:
            tensors[f"{name}.nested_absmax"] = q.nested_absmax
            tensors[f"{name}.nested_quant_map"] = dynamic_map().clone()
        return tensors

    def unpack(self, name: str, shape: tuple[int, int], get: Callable[[str], Tensor]) -> QuantizedTensor:
        """The matrix `name` of `shape` [N, K] from its stored tensors; `get` reads one by its full name."""
        state = _parse_state(name, get(f"{name}.{_STATE}"))
        expected = {"quant_type": "nf4", "blocksize": self.block_size, "shape": list(shape)}
        if self.double_quant:
            expected["nested_blocksize"] = NESTED_BLOCK
        for key, value in expected.items():
            if state.get(key) != value:
                raise CheckpointError(f"{name}: quant_state has {key} {state.get(key)!r}, expected {value!r}")
        if state.get("dtype") not in _DTYPES:
            raise CheckpointError(f"{name}: quant_state has dtype {state.get('dtype')!r}, no known float dtype")
        _expect_table(f"{name}.quant_map", get(f"{name}.quant_map"), codebook())
        nested, offset = None, None
        if self.double_quant:
            _expect_table(f"{name}.nested_quant_map", get(f"{name}.nested_quant_map"), dynamic_map())
            nested, offset = get(f"{name}.nested_absmax"), state.get("nested_offset")
            if not isinstance(offset, int | float):
                raise CheckpointError(f"{name}: quant_state has nested_offset {offset!r}, expected a number")
        codes, absmax = get(name).reshape(-1), get(f"{name}.absmax")
        try:
            return QuantizedTensor(shape, codes, absmax, nested, offset, self.block_size, _DTYPES[state["dtype"]])
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def quantization_config(self, skipped: list[str]) -> dict[str, Any]:
        """The `quantization_config` of `config.json`; `skipped` are the modules kept in 16 bit."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }

    @classmethod
    def from_quantization_config(cls, config: dict[str, Any], where: str) -> "NF4":
        """The format that a `quantization_config` names; ConfigError if it is not bitsandbytes NF4."""
        if config.get("quant_method") != "bitsandbytes" or not config.get("load_in_4bit"):
            raise ConfigError(
                f"{where}: quantization_config is {config.get('quant_method')!r}; expected bitsandbytes in 4 bit"
            )
        if config.get("bnb_4bit_quant_type") != "nf4":
            raise ConfigError(f"{where}: bnb_4bit_quant_type is {config.get('bnb_4bit_quant_type')!r}, expected 'nf4'")
        return cls(double_quant=bool(config.get("bnb_4bit_use_double_quant")))


FORMATS: dict[str, NF4 | None] = {"bf16": None, "nf4": NF4(double_quant=False), "nf4-dq": NF4()}


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
    """The absmax of each block, float32 [blocks], in bitsandbytes' order of operations."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax
    nested = q.nested_absmax.repeat_interleave(NESTED_BLOCK)[: q.absmax.numel()]
    return dynamic_map(q.device)[q.absmax.int()] * nested + q.nested_offset


def decode_rows(q: QuantizedTensor, rows: Tensor) -> Tensor:
    """Rows of `q` [N, K], int64 of any shape S: float32 [S, K]. K must be whole blocks."""
    K = q.shape[1]
    absmax = decode_absmax(q).view(q.shape[0], -1)[rows]
    values = level_values(q.codes.view(-1, K // 2)[rows].reshape(-1))
    blocks = values.reshape(*rows.shape, K // q.block_size, q.block_size)
    return (blocks * absmax[..., None]).reshape(*rows.shape, K)


def _encode_blocks(part: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (two a byte) and absmax of consecutive blocks; the last block may be short."""
    blocks = part
    short = -blocks.numel() % block_size
    if short:
        blocks = torch.nn.functional.pad(blocks, (0, short))
    blocks = blocks.view(-1, block_size)
    absmax = _absmax(blocks)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)[: part.numel() + part.numel() % 2]
    # Two codes read as one little-endian int16: the first is the low byte and becomes the high nibble.
    pair = nearest_levels(scaled).view(torch.int16)
    return ((pair << 4) | (pair >> 8)).to(torch.uint8), absmax


def _absmax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each row, float32; the way that is quicker on the device, one pass or three, by tenfold."""
    if blocks.device.type == "cpu":
        return blocks.float().abs().amax(dim=1)
    return torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1).float()


def nearest_levels(scaled: Tensor) -> Tensor:
    """Index of the level nearest to each value in [-1, 1], float32 [n]: uint8 [n]; ties go to the lower level."""
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, _bounds(scaled.device), out_int32=True).to(torch.uint8)
    # A table of equal cells instead of a binary search, ten times as fast: the cell tells all bounds but one.
    below, inside = _cells()
    cell = scaled.add(1).mul_(_CELLS / 2).to(torch.int32).clamp_(0, _CELLS)  # NaN: any cell will do
    codes = below.index_select(0, cell)
    return codes.add_(torch.gt(scaled, inside.index_select(0, cell)).view(torch.uint8))


@cache
def _cells() -> tuple[Tensor, Tensor]:
    """For each cell of [-1, 1]: how many bounds lie below it, uint8, and the one inside it, float32 (2 if none).

    No cell holds two bounds, and none lies near a cell's edge, so that rounding in finding the cell does no harm.
    """
    bounds = _bounds("cpu")
    cell = ((bounds + 1) * (_CELLS / 2)).int()
    below = (cell[:, None] < torch.arange(_CELLS + 1)).sum(0).to(torch.uint8)
    return below, torch.full((_CELLS + 1,), 2.0).scatter_(0, cell.long(), bounds)


def level_values(codes: Tensor) -> Tensor:
    """The levels that `codes`, uint8 [n], stand for, two a byte: float32 [2 n]."""
    return _pairs(codes.device).index_select(0, codes.int()).view(torch.float32)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte as one float64, [256]: a gather of 8 bytes is quicker than one of two 4s."""
    byte = torch.arange(256, device=device)
    pairs = torch.stack((codebook(device)[byte >> 4], codebook(device)[byte & 0xF]), dim=1)
    return pairs.view(torch.float64).view(-1)


def _scaled(values: Tensor, absmax: Tensor, q: QuantizedTensor) -> Tensor:
    """`values` float32 (one more than N*K if that is odd) times the absmax of their blocks, float32 [N*K]."""
    n = prod(q.shape)
    whole = n - n % q.block_size
    values[:whole].view(-1, q.block_size).mul_(absmax[: whole // q.block_size, None])
    values[whole:].mul_(absmax[-1])
    return values[:n]


def _state_json(q: QuantizedTensor) -> Tensor:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": str(q.source_dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    if q.nested_absmax is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": q.nested_offset,
        }
    text = json.dumps(state).encode()
    if len(text) > STATE_NBYTES:
        raise CheckpointError(f"quant_state of {len(text)} bytes is longer than {STATE_NBYTES}")
    return torch.frombuffer(bytearray(text.ljust(STATE_NBYTES)), dtype=torch.uint8)


def _parse_state(name: str, tensor: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.tolist()).decode())
    except ValueError as error:
        raise CheckpointError(f"{name}: quant_state is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name}: quant_state is not a JSON object")
    return state


def _expect_table(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=1e-6):
        raise CheckpointError(f"{name}: not bitsandbytes' table of {expected.numel()} levels")
