"""Layers of the released size with random 4-bit weights, made on the GPU: no file of this size is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minibble.quantize.builtin import BUILTIN
from minibble.quantize.config import ModelConfig
from minibble.quantize.formats import Format
from minibble.quantize.inventory import TensorSpec, quantized_roles
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.bench.weights import generator_on, random_matrix, random_tensor
from minibble.runtime.layout import by_module
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.planning.device_bytes import ConfigSource
from minibble.runtime.state import HybridState
from minibble.runtime.unfilled import Unfilled

PATTERN = (0, 0, 0, 0, 0, 0, 0, 1)  # of the released model: seven lightning layers, then a softmax layer
VOCABULARY = 512  # embedding and head are no part of what is measured

Part = Tensor | QuantizedTensor


def real_config(pattern: tuple[int, ...] = PATTERN, **overrides: object) -> ModelConfig:
    """The released model's config with the layers of `pattern` (1 is softmax attention) and a small vocabulary."""
    raw = BUILTIN["minimax-text-01"] | {
        "num_hidden_layers": len(pattern),
        "attn_type_list": list(pattern),
        "vocab_size": VOCABULARY,
    }
    return ModelConfig.from_dict(raw | overrides)


def random_model(
    config: ModelConfig, format: Format, devices: torch.device | Sequence[torch.device], seed: int = 0
) -> MiniMaxForCausalLM:
    """A model with random weights in `format`, the same for the same `seed`, with activations in bfloat16.

    `devices` are those of the layers, or the one of all.
    """
    return fill_randomly(Unfilled.on(ConfigSource.of(config, format), devices), seed)


def fill_randomly(unfilled: Unfilled, seed: int = 0, logits_LE: Tensor | None = None) -> MiniMaxForCausalLM:
    """The model with random weights on the devices where they go.

    `logits_LE` are the standard deviations of the routers' logits, 1 by default.
    """
    source = unfilled.source
    assert source.format is not None
    generators = {device: generator_on(device, seed) for device in unfilled.devices}
    specs = {spec.name: spec for spec in source.inventory}
    for module, names in by_module(source.config):
        chosen = [specs[name] for name in names]
        device = unfilled.device_of(chosen[0])
        generator = generators.get(device, generators[unfilled.devices[0]])
        parts = [_part(s, source.format, device, generator) for s in chosen]
        if chosen[0].role == "router" and logits_LE is not None:
            assert chosen[0].layer is not None and isinstance(parts[0], Tensor)
            parts[0] = parts[0] * logits_LE[chosen[0].layer].to(parts[0])[:, None]
        unfilled.fill(module, chosen, parts)
    return unfilled.filled()


def _part(spec: TensorSpec, format: Format, device: torch.device, generator: torch.Generator) -> Part:
    if spec.role in quantized_roles():
        return random_matrix((spec.shape[0], spec.shape[1]), format, device, generator)
    if spec.role == "norm":
        return torch.ones(spec.shape, dtype=torch.bfloat16, device=device)
    # Rows of the embedding and logits of the router come out with a standard deviation of 1.
    std = 1.0 if spec.role == "embedding" else spec.shape[-1] ** -0.5
    return random_tensor(spec.shape, std, device, generator)


def random_state(model: MiniMaxForCausalLM, batch: int, context: int, room: int = 64, seed: int = 0) -> HybridState:
    """What `context` random tokens of `batch` sequences could have left, with room for more."""
    config = model.minibble
    generators = {device: generator_on(device, seed) for device in model.devices}
    state = HybridState(config, reserve=context + room)
    H, G, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for index, (kind, layer) in enumerate(zip(config.attention, model.layers, strict=False)):
        device = layer.device
        if kind == "lightning":
            held = torch.randn(batch, H, K, K, device=device, generator=generators[device])
            state.set_lightning_state(index, held)
        else:
            shape = (batch, G, context + room, K)
            state.keys[index], state.values[index] = (
                random_tensor(shape, 1.0, device, generators[device]) for _ in range(2)
            )
    state.advance(context, None)
    return state
