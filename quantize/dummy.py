"""Writes checkpoints of any size with random weights, as fast as the disk takes them: for measuring, not for use."""

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

import minibble
from minibble.quantize import sizes
from minibble.quantize.config import ModelConfig
from minibble.quantize.inventory import TensorSpec, inventory, quantized_roles
from minibble.quantize.manifest import build_manifest
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import encode_absmax
from minibble.quantize.shards import plan_shards
from minibble.quantize.tensors import QuantizedTensor
from minibble.quantize.writer import CheckpointWriter, Produced

# Primes, so that no two rows or matrices start at the same place of a pool.
_CODE_POOL_NBYTES = 67_108_859
_FLOAT_POOL = 16_777_213
_EMBEDDING_STD = 0.02
# Uniform codes have a standard deviation of 0.517 of the block's absmax.
_CODE_STD = 0.517


def write_dummy(
    config: ModelConfig,
    out: str | Path,
    *,
    format: NF4 | None = NF4(),  # noqa: B008 (frozen)
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
        raw["quantization_config"] = format.quantization_config(["block_sparse_moe.gate", "mlp.gate", "lm_head"])
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
        writer.finish(raw, manifest, [])
    return sum(shard.tensor_nbytes for shard in shards)


def _produce(specs: tuple[TensorSpec, ...], format: NF4 | None, roles: frozenset[str], seed: int) -> Iterator[Produced]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**62), 2**62, (_CODE_POOL_NBYTES // 8 + 1,), generator=generator)
    codes = words.view(torch.uint8)[:_CODE_POOL_NBYTES]
    normal = torch.randn(_FLOAT_POOL, generator=generator).bfloat16()
    scaled = cache(lambda std: normal * std)
    scales = cache(_scales)

    def cut(pool: Tensor, count: int) -> Tensor:
        start = int(torch.randint(pool.numel(), (), generator=generator))
        first = pool[start : start + count]
        repeats = -(-(count - first.numel()) // pool.numel())
        return torch.cat([first, *[pool] * repeats])[:count]

    for spec in specs:
        if format is not None and spec.role in roles:
            absmax, nested, offset = scales(spec.shape, format)
            half = -(-prod(spec.shape) // 2)
            shape = (spec.shape[0], spec.shape[1])
            q = QuantizedTensor(shape, cut(codes, half), absmax, nested, offset, format.block_size)
            yield Produced(spec.name, format.pack(spec.name, q))
        elif spec.role == "norm":
            yield Produced(spec.name, {spec.name: torch.ones(spec.shape, dtype=torch.bfloat16)})
        else:
            std = _EMBEDDING_STD if spec.role in ("embedding", "head") else spec.shape[-1] ** -0.5
            yield Produced(spec.name, {spec.name: cut(scaled(std), spec.numel).reshape(spec.shape)})


def _scales(shape: tuple[int, ...], format: NF4) -> tuple[Tensor, Tensor | None, float | None]:
    """Scales of one matrix, within 20 % of what gives its weights a standard deviation of 1/sqrt(K)."""
    blocks = -(-prod(shape) // format.block_size)
    spread = torch.linspace(0.8, 1.2, 251)[torch.arange(blocks) % 251]
    absmax = spread * (shape[-1] ** -0.5 / _CODE_STD)
    if not format.double_quant:
        return absmax, None, None
    return encode_absmax(absmax)
