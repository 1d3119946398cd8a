"""The 4-bit formats: what they have in common, their names, and which one a `config.json` means.

Importing this is light: a format's own module, and torch with it, is imported when the format is made.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from minibble.quantize.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minibble.quantize.tensors import Levels, QuantizedTensor


class Format(Protocol):
    """How matrices [N, K] are encoded, decoded, named and laid out in files, and how many bytes they take."""

    @property
    def name(self) -> str:
        """One of FORMATS, or int4-gG for another group size G."""
        ...

    @property
    def levels(self) -> "Levels":
        """What the codes stand for."""
        ...

    @property
    def block_size(self) -> int:
        """Consecutive weights of a row that share a scale."""
        ...

    def encode(self, weight: "Tensor") -> "QuantizedTensor":
        """`weight` [N, K] (any float dtype, any device), each weight rounded to the nearest level."""
        ...

    def assemble(
        self, shape: tuple[int, int], codes: "Tensor", scales: "Tensor", source_dtype: "torch.dtype"
    ) -> "QuantizedTensor":
        """A matrix of codes, uint8 two a byte, and scales, float32 [blocks], which are rounded as the files do."""
        ...

    def decode(self, q: "QuantizedTensor", dtype: "torch.dtype" = ...) -> "Tensor":
        """The matrix [N, K] that `q` stands for, rounded once from float32 to `dtype` (float32 by default)."""
        ...

    def codes_name(self, name: str) -> str:
        """The stored tensor that holds the codes of the matrix `name`."""
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> "dict[str, tuple[torch.dtype, tuple[int, ...]]]":
        """dtype and shape of every tensor that `pack` writes for the matrix `name` of `shape` [N, K].

        ConfigError names the matrix if the format cannot hold its shape.
        """
        ...

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of one matrix [N, K] on disk."""
        ...

    def held_nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one matrix [N, K] in memory as a QuantizedTensor."""
        ...

    def pack(self, name: str, q: "QuantizedTensor") -> "dict[str, Tensor]":
        """The tensors under which files hold `q` as the parameter `name`, on the device of `q`."""
        ...

    def unpack(self, name: str, shape: tuple[int, int], get: "Callable[[str], Tensor]") -> "QuantizedTensor":
        """The matrix `name` of `shape` [N, K] from its stored tensors; `get` reads one by its full name."""
        ...

    def quantization_config(self, skipped: list[str]) -> dict[str, Any]:
        """The `quantization_config` of `config.json`; `skipped` are the modules kept in 16 bit."""
        ...

    def extra_json(self, skipped: list[str]) -> dict[str, dict[str, Any]]:
        """Other JSON files of a checkpoint, by file name."""
        ...


def _nf4(double_quant: bool) -> Format:
    from minibble.quantize.nf4 import NF4

    return NF4(double_quant=double_quant)


def _int4() -> Format:
    from minibble.quantize.int4 import Int4

    return Int4()


_FORMATS: dict[str, Callable[[], Format | None]] = {
    "bf16": lambda: None,
    "nf4": lambda: _nf4(False),
    "nf4-dq": lambda: _nf4(True),
    "int4-g128": _int4,
}
FORMATS = tuple(_FORMATS)


def format_named(name: str) -> Format | None:
    """The format called `name`, one of FORMATS; None for bf16, ConfigError for an unknown one."""
    if name not in _FORMATS:
        raise ConfigError(f"unknown format '{name}'; there are {', '.join(FORMATS)}")
    return _FORMATS[name]()


def format_of(quantization_config: Any, where: str) -> Format:
    """The format that the `quantization_config` of the file `where` means; ConfigError if it is none of ours."""
    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    if method == "bitsandbytes":
        from minibble.quantize.nf4 import NF4

        return NF4.from_quantization_config(quantization_config, where)
    if method == "gptq":
        from minibble.quantize.int4 import Int4

        return Int4.from_quantization_config(quantization_config, where)
    raise ConfigError(f"{where}: quantization_config is {method!r}; expected bitsandbytes (NF4) or gptq, in 4 bit")
