"""What each part of a model takes on a GPU: layers without their experts, one expert's record, cache, state, work.

Always counted in the layout of the fused kernels, whether they can be compiled on the machine that counts or not.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import ConfigError
from minibble.quantize.formats import Format, format_named
from minibble.quantize.inventory import EMBEDDING, TensorSpec, inventory, quantized_roles
from minibble.runtime.footprint import kv_cache_bytes, state_bytes
from minibble.runtime.kernels.tiles import TileLayout
from minibble.runtime.layout import by_module
from minibble.runtime.plan import PREFILL_CHUNK_CUDA, Source, fused_workspace_nbytes, module_nbytes, stored_nbytes

CUDA = torch.device("cuda", 0)
# Outside of torch's allocator, on Hopper: the CUDA context with the modules of torch, cuBLAS and Triton that it loads.
# 745 MB were measured after decoding, 800 to 840 after prompts, too, with the graphs of a step of 40 layers.
CONTEXT_NBYTES = 800_000_000
# Captured decode steps: some 800 launches a graph for 80 layers, up to 16 graphs (`graphs.MAX_GRAPHS`), 4 kB a launch.
GRAPHS_NBYTES = 64 << 20
OVERHEAD_NBYTES = CONTEXT_NBYTES + GRAPHS_NBYTES
# Page tables on every GPU for pinned host memory: 8 bytes for 4 KiB. 177 GB took 350 MB on each of two.
MAPPED_SHARE = 8 / 4096
# What torch's allocator holds beside tensors: 0.28 GB with a workspace of 0.36 GB, 0.43 with 0.66, 0.53 with 1.16.
RESERVE_NBYTES, RESERVE_SHARE = 200_000_000, 0.3


@dataclass(frozen=True)
class ConfigSource:
    """A model that is only a config: what planning reads of a checkpoint that would be written in `format`."""

    config: ModelConfig
    inventory: tuple[TensorSpec, ...]
    quantized: frozenset[str]
    format: Format | None

    @classmethod
    def of(cls, config: ModelConfig, format: str | Format) -> "ConfigSource":
        """`format` may be one of `footprint.FORMAT_NAMES`; ConfigError for another name."""
        everything = isinstance(format, str) and format.endswith("-all")
        held = format_named(format.removesuffix("-all")) if isinstance(format, str) else format
        roles = frozenset() if held is None else quantized_roles(everything, everything)
        specs = inventory(config)
        return cls(config, specs, frozenset(spec.name for spec in specs if spec.role in roles), held)


@dataclass(frozen=True)
class ModelBytes:
    """Weights on GPUs: of each of the `layers` without experts, of one expert's `record`, of embedding and tail.

    The tail is the final norm and the head. `movable_bytes` of the embedding may as well be in host memory: all of it,
    or nothing of one in 4 bits, which the CPU is slow to decode. `loading_bytes` is what laying out the largest matrix
    takes.
    """

    layers: tuple[int, ...]
    record_bytes: int
    embedding_bytes: int
    movable_bytes: int
    tail_bytes: int
    loading_bytes: int


def model_bytes(source: Source, dtype: torch.dtype) -> ModelBytes:
    """The bytes of `source` with activations of `dtype`; ConfigError if its experts are not all alike."""
    format: Any = source.format  # formats are frozen, and so hashable; the protocol does not say so
    return _model_bytes(source.config, format, source.quantized, dtype)


@lru_cache(maxsize=8)  # the inventory of the released model has 8,243 tensors: 60 ms, for each of many plans
def _model_bytes(
    config: ModelConfig, format: Format | None, quantized: frozenset[str], dtype: torch.dtype
) -> ModelBytes:
    source = ConfigSource(config, inventory(config), quantized, format)
    specs = {spec.name: spec for spec in source.inventory}
    layers, records = [0] * config.num_hidden_layers, dict[tuple[int, int], int]()
    outer, loading = {True: 0, False: 0}, 0
    kinds: dict[tuple[object, ...], tuple[int, int]] = {}
    for _, names in by_module(config):
        parts = [specs[name] for name in names]
        first = parts[0]
        kind = (first.role, first.expert is None, *((spec.shape, spec.name in quantized) for spec in parts))
        if kind not in kinds:
            nbytes = module_nbytes(parts, source, CUDA, dtype, fused=dtype == torch.bfloat16)
            kinds[kind] = nbytes, stored_nbytes(parts, source)
        nbytes, stored = kinds[kind]
        loading = max(loading, 2 * stored)
        if first.layer is None:
            outer[first.name == EMBEDDING] += nbytes
        elif first.expert is None:
            layers[first.layer] += nbytes
        else:
            key = (first.layer, first.expert)
            records[key] = records.get(key, 0) + nbytes
    sizes = (config.hidden_size, config.intermediate_size)
    wide = any(spec.role == "expert" and spec.name not in quantized for spec in source.inventory)
    if format is None or (wide and len(set(records.values())) == 1) or _expert_layout(*sizes, format) is None:
        raise ConfigError(
            "only experts in 4 bits, in a shape that the kernels' layout holds, can be divided among GPUs, host memory "
            "and disk: quantize them, or plan without GPUs"
        )
    if len(set(records.values())) != 1:
        raise ConfigError(
            "the experts of this checkpoint are not all of one size, some in 4 bits and some not, so they cannot share "
            "slots: quantize all of them, or run it on one GPU that holds everything"
        )
    movable = 0 if EMBEDDING in quantized else outer[True]
    return ModelBytes(tuple(layers), next(iter(records.values())), outer[True], movable, outer[False], loading)


def _expert_layout(D: int, F: int, format: Format) -> TileLayout | None:
    """Of an expert's down, if its gate and up have one, too."""
    return TileLayout.of_format((F, F), D, format, True) and TileLayout.of_format((D,), F, format)


@dataclass(frozen=True)
class Demand:
    """What every stretch of layers takes on a GPU beside its experts, for given sequences: sums up to each layer.

    `weights`, `caches` and `states` have one entry more than there are layers. `workspace_bytes` are those of every
    GPU that has layers; `logits_bytes` come to them on the last one. `pinned_bytes` is the host memory that is mapped,
    `moved_bytes` what host memory takes of the embedding.
    """

    model: ModelBytes
    weights: tuple[int, ...]
    caches: tuple[int, ...]
    states: tuple[int, ...]
    workspace_bytes: int
    logits_bytes: int
    pinned_bytes: int = 0
    moved_bytes: int = 0

    @classmethod
    def of(
        cls,
        source: Source,
        dtype: torch.dtype,
        context: int,
        batch: int,
        prefill_chunk: int,
        pinned_bytes: int = 0,
        moved_bytes: int = 0,
    ) -> "Demand":
        """For `batch` sequences of `context` tokens, which enter by `prefill_chunk` at a time."""
        config, model = source.config, model_bytes(source, dtype)
        softmax, lightning = (max(config.attention.count(kind), 1) for kind in ("softmax", "lightning"))
        cache = kv_cache_bytes(config, context, batch, dtype.itemsize) // softmax
        state = state_bytes(config, batch) // lightning
        running = fused_workspace_nbytes(config, dtype, batch * min(context, prefill_chunk))
        return cls(
            model,
            tuple(accumulate(model.layers, initial=0)),
            tuple(accumulate((cache * (kind == "softmax") for kind in config.attention), initial=0)),
            tuple(accumulate((state * (kind == "lightning") for kind in config.attention), initial=0)),
            max(running, model.loading_bytes),
            4 * batch * config.vocab_size,
            pinned_bytes,
            moved_bytes,
        )

    def parts(self, start: int, stop: int) -> dict[str, int]:
        """Bytes beside experts of the GPU with the layers from `start` up to `stop`, by what they are for."""
        first, last = start == 0, stop == len(self.model.layers)
        ends = first * (self.model.embedding_bytes - self.moved_bytes) + last * self.model.tail_bytes
        return {
            "weights_bytes": self.weights[stop] - self.weights[start] + ends,
            "kv_cache_bytes": self.caches[stop] - self.caches[start],
            "state_bytes": self.states[stop] - self.states[start],
            "workspace_bytes": self.workspace_bytes + last * self.logits_bytes,
            "reserve_bytes": RESERVE_NBYTES + int(RESERVE_SHARE * self.workspace_bytes),
            "overhead_bytes": OVERHEAD_NBYTES + int(self.pinned_bytes * MAPPED_SHARE),
        }


def default_chunk(batch: int) -> int:
    """Tokens of each of `batch` sequences that go through the layers at a time: together as many as of one."""
    return max(1, PREFILL_CHUNK_CUDA // batch)
