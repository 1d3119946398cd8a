"""The format int4: symmetric, in groups that share a scale, in the files of AutoGPTQ v1 that GPTQ tools read.

The arithmetic is in int4_math.py, the files are described in docs/format.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.int4_math import encode_groups
from minibble.quantize.nf4_math import decode
from minibble.quantize.tensors import Levels, QuantizedTensor

QUANTIZE_CONFIG = "quantize_config.json"
_PACKED = 8  # codes in an int32
_ZEROS = 0x77777777  # eight zero points of 8; version 1 of the format stores one less
_ZEROS_V2 = -0x77777778  # 0x88888888: eight zero points of 8 as version 2 stores them


@dataclass(frozen=True)
class Int4:
    """The format: how int4 matrices are encoded, decoded, packed, and how many bytes they take."""

    group_size: int = 128

    def __post_init__(self) -> None:
        if self.group_size < _PACKED or self.group_size % _PACKED:
            raise ConfigError(f"group size {self.group_size} is no positive multiple of {_PACKED}")

    @property
    def name(self) -> str:
        return f"int4-g{self.group_size}"

    @property
    def levels(self) -> Levels:
        return "int4"

    @property
    def block_size(self) -> int:
        return self.group_size

    def encode(self, weight: Tensor) -> QuantizedTensor:
        """Round `weight` [N, K] (any float dtype, any device) to nearest under searched scales."""
        if weight.ndim != 2 or weight.shape[1] % self.group_size:
            raise CheckpointError(
                f"only matrices of whole groups of {self.group_size} become int4, found shape {tuple(weight.shape)}"
            )
        codes, scales = encode_groups(weight, self.group_size)
        return self._of((weight.shape[0], weight.shape[1]), codes, scales, weight.dtype)

    def assemble(
        self, shape: tuple[int, int], codes: Tensor, scales: Tensor, source_dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedTensor:
        """The matrix [N, K] of `codes`, two a byte, and `scales`, float32 [N*K/group_size]."""
        return self._of(shape, codes, scales.half(), source_dtype)

    def decode(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that `q` stands for, rounded once from float32 to `dtype`."""
        return decode(q, dtype)

    def codes_name(self, name: str) -> str:
        """The stored tensor that holds the codes of the matrix `name`, which ends in `.weight`."""
        return f"{_module(name)}.qweight"

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor that `pack` writes for the matrix `name` of `shape` [N, K].

        ConfigError if K is not whole groups or N no multiple of 8.
        """
        (N, K), module = shape, _module(name)
        if K % self.group_size or N % _PACKED:
            raise ConfigError(
                f"{name} is {N} x {K}; int4 needs rows of whole groups of {self.group_size} weights and a multiple of "
                f"{_PACKED} rows: choose another group size, or NF4"
            )
        groups = K // self.group_size
        return {
            f"{module}.qweight": (torch.int32, (K // _PACKED, N)),
            f"{module}.qzeros": (torch.int32, (groups, N // _PACKED)),
            f"{module}.scales": (torch.float16, (groups, N)),
            f"{module}.g_idx": (torch.int32, (K,)),
        }

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of one matrix [N, K] on disk, zero points and group indices included."""
        stored = self.stored(f"a matrix of {list(shape)}", shape)
        return sum(dtype.itemsize * prod(shape) for dtype, shape in stored.values())

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and scales of one matrix [N, K] in memory."""
        return prod(shape) // 2 + 2 * (prod(shape) // self.group_size)

    def pack(self, name: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors under which GPTQ tools store `q` as the parameter `name`, on the device of `q`."""
        (N, K), module, device = q.shape, _module(name), q.device
        groups = K // self.group_size
        return {
            f"{module}.qweight": _swapped(q.codes.view(N, K // 2).view(torch.int32).t().contiguous()),
            f"{module}.qzeros": torch.full((groups, N // _PACKED), _ZEROS, dtype=torch.int32, device=device),
            f"{module}.scales": q.absmax.view(N, groups).t().contiguous(),
            f"{module}.g_idx": self._g_idx(K, device),
        }

    def unpack(self, name: str, shape: tuple[int, int], get: Callable[[str], Tensor]) -> QuantizedTensor:
        """The matrix `name` of `shape` [N, K] from its stored tensors; `get` reads one by its full name.

        CheckpointError if its zero points are not symmetric or its groups not consecutive columns.
        """
        parts = {key: get(key) for key in self.stored(name, shape)}
        qweight, qzeros, scales, g_idx = parts.values()
        self._check(name, shape, parts)
        if bool((qzeros != _ZEROS).any()):
            second = " (those of gptq_v2, whatever the label)" if bool((qzeros == _ZEROS_V2).all()) else ""
            raise CheckpointError(
                f"{name}: qzeros hold other zero points than 7{second}; expected the symmetric ones of AutoGPTQ v1"
            )
        if not torch.equal(g_idx, self._g_idx(shape[1], g_idx.device)):
            raise CheckpointError(
                f"{name}: g_idx is not sequential; a file made with desc_act needs static groups to be read here"
            )
        codes = _swapped(qweight.t().contiguous()).view(torch.uint8).view(-1)
        return self._of(shape, codes, scales.t().contiguous().view(-1))

    def quantization_config(self, skipped: list[str]) -> dict[str, Any]:
        """The `quantization_config` of `config.json`; `skipped` are the modules kept in 16 bit."""
        # Activation order, where it was used, chose only the order of rounding: the groups are those of desc_act false.
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": self.group_size,
            "sym": True,
            "desc_act": False,
            "lm_head": "lm_head" not in skipped,
        }

    def extra_json(self, skipped: list[str]) -> dict[str, dict[str, Any]]:
        """`quantize_config.json`, where tools look that do not read `config.json`."""
        return {QUANTIZE_CONFIG: self.quantization_config(skipped)}

    @classmethod
    def from_quantization_config(cls, config: dict[str, Any], where: str) -> "Int4":
        """The format that a `quantization_config` names; ConfigError if it is not symmetric 4-bit GPTQ, version 1."""
        expected = {"bits": 4, "sym": True, "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32"}
        for key, value in expected.items():
            found = config.get(key)
            if found != value and (found is not None or key == "bits"):
                raise ConfigError(f"{where}: quantization_config has {key} {found!r}, expected {value!r}")
        group_size = config.get("group_size")
        if not isinstance(group_size, int) or group_size < _PACKED or group_size % _PACKED:
            raise ConfigError(
                f"{where}: quantization_config has group_size {group_size!r}, expected a positive multiple of {_PACKED}"
            )
        return cls(group_size)

    def _of(
        self, shape: tuple[int, int], codes: Tensor, scales: Tensor, source_dtype: torch.dtype = torch.bfloat16
    ) -> QuantizedTensor:
        return QuantizedTensor(
            shape, codes, scales, block_size=self.group_size, source_dtype=source_dtype, levels="int4"
        )

    def _g_idx(self, K: int, device: torch.device) -> Tensor:
        """The group of each column."""
        return torch.arange(K, dtype=torch.int32, device=device) // self.group_size

    def _check(self, name: str, shape: tuple[int, int], parts: dict[str, Tensor]) -> None:
        for key, (dtype, expected) in self.stored(name, shape).items():
            found = parts[key]
            if found.dtype != dtype or tuple(found.shape) != expected:
                raise CheckpointError(
                    f"{name}: {key} is {found.dtype} {tuple(found.shape)}, expected {dtype} {expected}"
                )


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _swapped(words: Tensor) -> Tensor:
    """Int32 words, the nibbles of every byte exchanged: files have the first code in the low one."""
    each = words.reshape(-1).view(torch.uint8)
    return ((each << 4) | (each >> 4)).view(torch.int32).view(words.shape)
