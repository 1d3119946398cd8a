"""What shapes the output of a quantization, whatever the source."""

from dataclasses import dataclass

from minibble.quantize import sizes
from minibble.quantize.errors import ConfigError
from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4

DEFAULT_SHARD_SIZE = "5GB"
METHODS = ("nf4", "gptq")


@dataclass(frozen=True)
class Settings:
    """What shapes the output; sizes in bytes."""

    method: str
    block_size: int
    double_quant: bool
    quantize_head: bool
    quantize_embedding: bool
    shard_size: int

    @property
    def format(self) -> Format:
        """How matrices are stored."""
        return Int4(self.block_size) if self.method == "gptq" else NF4(self.block_size, self.double_quant)


def make_settings(
    method: str = "nf4",
    *,
    group_size: int | None = None,
    double_quant: bool = True,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
    shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> Settings:
    """Settings with defaults filled in; `shard_size` in bytes or as in 5GB. ConfigError for what cannot be."""
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    if method == "nf4" and group_size not in (None, NF4().block_size):
        raise ConfigError(f"group size {group_size}: NF4 has blocks of {NF4().block_size}; --method gptq takes others")
    block_size = NF4().block_size if method == "nf4" else group_size or Int4().block_size
    nbytes = sizes.parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    return Settings(method, block_size, double_quant and method == "nf4", quantize_head, quantize_embedding, nbytes)
