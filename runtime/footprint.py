"""How many bytes a model takes, from its config and a format alone: pure arithmetic, no tensors.

The weights are counted per part (experts, attention, embeddings, other) exactly as they lie on disk; the KV cache
of the softmax layers and the state of the lightning layers as they lie in memory while the model runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import ConfigError
from minibble.quantize.formats import Format, format_named
from minibble.quantize.inventory import Role, TensorSpec, inventory, quantized_roles

PARTS = ("experts", "attention", "embeddings", "other")

_PART_OF: dict[Role, str] = {
    "expert": "experts",
    "attention": "attention",
    "embedding": "embeddings",
    "head": "embeddings",
    "router": "other",
    "norm": "other",
}

_ALL = "-all"  # after a format's name: embedding and head are 4-bit too
# The columns of a report: the formats, and with _ALL the one that is nearest to 228 GB.
FORMAT_NOTES = {
    "bf16": "16 bit, as released",
    "nf4": "experts and attention 4-bit, float32 scales",
    "nf4-dq": "experts and attention 4-bit, double quantization",
    "nf4-dq-all": "the same, embedding and head 4-bit too",
    "int4-g128": "experts and attention in GPTQ's int4, groups of 128",
}
FORMAT_NAMES = tuple(FORMAT_NOTES)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's weights in one format: `parts` maps each of PARTS to its bytes."""

    format: str
    parameters: int
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return self.total_bytes * 8 / self.parameters


def part_of(spec: TensorSpec) -> str:
    """The part of PARTS that a tensor belongs to; embedding and head together are `embeddings`."""
    return _PART_OF[spec.role]


def sum_parts(specs: Iterable[TensorSpec], nbytes: Callable[[TensorSpec], int]) -> dict[str, int]:
    """Sum `nbytes(spec)` per part."""
    parts = dict.fromkeys(PARTS, 0)
    for spec in specs:
        parts[part_of(spec)] += nbytes(spec)
    return parts


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Number of weights in each part."""
    return sum_parts(inventory(config), lambda spec: spec.numel)


def footprint(config: ModelConfig, format: str = "nf4-dq", itemsize: int = 2) -> Footprint:
    """Bytes of all tensors in `format`, one of FORMAT_NAMES; `itemsize` is that of an unquantized weight.

    ConfigError if the format is unknown or cannot hold one of the model's shapes.
    """
    if format not in FORMAT_NAMES:
        raise ConfigError(f"unknown format '{format}'; there are {', '.join(FORMAT_NAMES)}")
    specs = inventory(config)
    everything = format.endswith(_ALL)
    stored = format_named(format.removesuffix(_ALL))
    if stored is None:
        parts = sum_parts(specs, lambda spec: spec.numel * itemsize)
    else:
        parts = _quantized_parts(specs, stored, quantized_roles(everything, everything), itemsize)
    return Footprint(format, sum(spec.numel for spec in specs), parts)


def footprints(config: ModelConfig) -> dict[str, Footprint]:
    """The footprint in each of FORMAT_NAMES that can hold the model's shapes."""
    found = {}
    for name in FORMAT_NAMES:
        with suppress(ConfigError):
            found[name] = footprint(config, name)
    return found


def _quantized_parts(
    specs: Iterable[TensorSpec], format: Format, roles: frozenset[Role], itemsize: int
) -> dict[str, int]:
    """Count each (role, shape) once: the real model has 8,243 tensors of about a dozen kinds."""
    parts = dict.fromkeys(PARTS, 0)
    for (role, shape, numel), count in Counter((s.role, s.shape, s.numel) for s in specs).items():
        each = format.nbytes(shape) if role in roles else numel * itemsize
        parts[_PART_OF[role]] += count * each
    return parts


def kv_cache_bytes(config: ModelConfig, context: int, batch: int = 1, itemsize: int = 2) -> int:
    """Bytes of keys and values of the softmax layers for `batch` sequences of `context` tokens."""
    layers = config.attention.count("softmax")
    return 2 * layers * config.num_key_value_heads * config.head_dim * itemsize * context * batch


def state_bytes(config: ModelConfig, batch: int = 1) -> int:
    """Bytes of the lightning layers' state [heads, head_dim, head_dim], float32, whatever the context."""
    layers = config.attention.count("lightning")
    return 4 * layers * config.num_attention_heads * config.head_dim**2 * batch
