"""The format NF4: how matrices are encoded, decoded, and named and laid out in files.

Serialization is bitsandbytes' own: every tensor written here is decoded by bitsandbytes to the same bits. The
arithmetic is in nf4_math.py, the files are described in docs/format.md.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.nf4_math import (
    codebook,
    decode,
    dynamic_map,
    encode_absmax,
    encode_blocks,
)
from minibble.quantize.parallel import spread
from minibble.quantize.tensors import NESTED_BLOCK, Levels, QuantizedTensor

# The JSON beside each matrix is padded with spaces to this length, so that sizes are known beforehand.
STATE_NBYTES = 192
_STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CHUNK_CPU = 1 << 18  # weights a thread encodes at a time
_CHUNK_GPU = 1 << 24  # weights: 64 MiB of float32 work


@dataclass(frozen=True)
class NF4:
    """The format: how NF4 matrices are encoded, decoded, packed, and how many bytes they take."""

    block_size: int = 64
    double_quant: bool = True

    @property
    def name(self) -> str:
        return "nf4-dq" if self.double_quant else "nf4"

    @property
    def levels(self) -> Levels:
        return "nf4"

    def encode(self, weight: Tensor) -> QuantizedTensor:
        """Round `weight` [N, K] (any float dtype, any device) to the nearest level of its blocks."""
        if weight.ndim != 2:
            raise CheckpointError(f"only matrices become NF4, found shape {tuple(weight.shape)}")
        flat = weight.reshape(-1)
        codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-flat.numel() // self.block_size), device=weight.device)

        def encode_from(start: int) -> None:
            part = flat[start : start + chunk]
            codes_part, absmax_part = encode_blocks(part, self.block_size)
            codes[start // 2 : start // 2 + codes_part.numel()] = codes_part
            block = start // self.block_size
            absmax[block : block + absmax_part.numel()] = absmax_part

        chunk = _CHUNK_CPU if weight.device.type == "cpu" else _CHUNK_GPU
        spread(encode_from, range(0, flat.numel(), chunk), weight.device)
        return self.assemble((weight.shape[0], weight.shape[1]), codes, absmax, weight.dtype)

    def assemble(
        self, shape: tuple[int, int], codes: Tensor, scales: Tensor, source_dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedTensor:
        """The matrix [N, K] of `codes`, two a byte, and absmax `scales`, float32 [blocks]."""
        if not self.double_quant:
            return QuantizedTensor(shape, codes, scales, None, None, self.block_size, source_dtype)
        return QuantizedTensor(shape, codes, *encode_absmax(scales), self.block_size, source_dtype)

    def decode(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that `q` stands for, rounded once from float32 to `dtype`."""
        return decode(q, dtype)

    def codes_name(self, name: str) -> str:
        """The stored tensor that holds the codes of the matrix `name`: the one of its own name."""
        return name

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
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

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and scales of one matrix [N, K] in memory."""
        blocks = -(-prod(shape) // self.block_size)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) if self.double_quant else 4 * blocks
        return -(-prod(shape) // 2) + scales

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

    def extra_json(self, skipped: list[str]) -> dict[str, dict[str, Any]]:
        """No other files belong to it."""
        return {}

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
