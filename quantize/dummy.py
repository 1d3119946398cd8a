"""Writes checkpoints of any size with random weights, as fast as the disk takes them: for measuring, not for use."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

import minibble
from minibble.quantize import sizes
from minibble.quantize.config import ModelConfig
from minibble.quantize.formats import Format
from minibble.quantize.inventory import TensorSpec, inventory, quantized_roles
from minibble.quantize.manifest import build_manifest
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import level_table
from minibble.quantize.shards import plan_shards
from minibble.quantize.tensors import QuantizedTensor
from minibble.quantize.writer import CheckpointWriter, Produced

# Primes, so that no two rows or matrices start at the same place of a pool.
_CODE_POOL_NBYTES = 67_108_859
_FLOAT_POOL = 16_777_213
_EMBEDDING_STD = 0.02
_SKIPPED = ["block_sparse_moe.gate", "mlp.gate", "lm_head"]


def write_dummy(
    config: ModelConfig,
    out: str | Path,
    *,
    format: Format | None = NF4(),  # noqa: B008 (frozen)
    seed: int = 0,
    shard_size: str | int = "5GB",
) -> int:
    """Write a random checkpoint of `config` to the new folder `out`; returns its bytes of tensors.

    4-bit with random codes and scales such that weights have standard deviation 1/sqrt(K), or bfloat16 if
    `format` is None. Embedding and head have standard deviation 0.02, norms are ones. Numbers repeat: they are
    cut from pools of random ones.
    """
    specs = inventory(config)
    roles: frozenset[str] = frozenset() if format is None else quantized_roles()
    layouts = [
        format.stored(spec.name, spec.shape)
        if format is not None and spec.role in roles
        else {spec.name: (torch.bfloat16, spec.shape)}
        for spec in specs
    ]
    nbytes = sizes.parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    shards = plan_shards(zip((spec.name for spec in specs), layouts, strict=True), nbytes)
    raw = dict(config.raw)
    if format is not None:
        raw["quantization_config"] = format.quantization_config(_SKIPPED)
    identity = {
        "version": minibble.__version__,
        "source": {"dummy": config.model_type, "seed": seed},
        "settings": {"format": "bf16" if format is None else format.name, "shard_size": nbytes},
    }
    produced = _produce(specs, format, roles, seed)
    with CheckpointWriter(Path(out), shards, identity) as writer:
        for shard in shards:
            writer.write_shard(shard, (next(produced) for _ in shard.names))
        writer.wait()
        manifest = build_manifest(identity, {}, writer.sealed, {}, {}, ["random weights"])
        writer.finish(raw, manifest, [], {} if format is None else format.extra_json(_SKIPPED))
    return sum(shard.tensor_nbytes for shard in shards)


def _produce(
    specs: tuple[TensorSpec, ...], format: Format | None, roles: frozenset[str], seed: int
) -> Iterator[Produced]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**62), 2**62, (_CODE_POOL_NBYTES // 8 + 1,), generator=generator)
    codes = words.view(torch.uint8)[:_CODE_POOL_NBYTES]
    normal = torch.randn(_FLOAT_POOL, generator=generator).bfloat16()
    scaled = cache(lambda std: normal * std)

    def cut(pool: Tensor, count: int) -> Tensor:
        start = int(torch.randint(pool.numel(), (), generator=generator))
        first = pool[start : start + count]
        repeats = -(-(count - first.numel()) // pool.numel())
        return torch.cat([first, *[pool] * repeats])[:count]

    @cache
    def template(shape: tuple[int, int]) -> QuantizedTensor:
        assert format is not None
        return _template(shape, format)

    for spec in specs:
        if spec.role in roles:
            assert format is not None
            q = template((spec.shape[0], spec.shape[1]))
            q = replace(q, codes=cut(codes, q.codes.numel()))
            yield Produced(spec.name, format.pack(spec.name, q))
        elif spec.role == "norm":
            yield Produced(spec.name, {spec.name: torch.ones(spec.shape, dtype=torch.bfloat16)})
        else:
            std = _EMBEDDING_STD if spec.role in ("embedding", "head") else spec.shape[-1] ** -0.5
            yield Produced(spec.name, {spec.name: cut(scaled(std), spec.numel).reshape(spec.shape)})


def _template(shape: tuple[int, int], format: Format) -> QuantizedTensor:
    """A matrix with scales within 20 % of what gives uniform codes a standard deviation of 1/sqrt(K)."""
    blocks = -(-prod(shape) // format.block_size)
    spread = torch.linspace(0.8, 1.2, 251)[torch.arange(blocks) % 251]
    scales = spread * (shape[-1] ** -0.5 / level_table(format.levels).std(correction=0))
    codes = torch.zeros(-(-prod(shape) // 2), dtype=torch.uint8)
    return format.assemble(shape, codes, scales, torch.bfloat16)
