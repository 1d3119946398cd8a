"""Where each tensor of the inventory lies in the model: which module, and which of its rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from minibble.quantize.config import ModelConfig
from minibble.quantize.inventory import EMBEDDING, FINAL_NORM, HEAD, inventory

# Inventory names of a layer's modules -> the model's, and, for matrices that share one, in which order.
_MODULES = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_norm",
    "block_sparse_moe.gate": "moe.router",
    "self_attn.norm": "attention.norm",
    "self_attn.qkv_proj": "attention.in_proj",
    "self_attn.output_gate": "attention.in_proj",
    "self_attn.q_proj": "attention.in_proj",
    "self_attn.k_proj": "attention.in_proj",
    "self_attn.v_proj": "attention.in_proj",
    "self_attn.out_proj": "attention.out_proj",
    "self_attn.o_proj": "attention.out_proj",
}
_EXPERT_MODULES = {"w1": "gate_up", "w3": "gate_up", "w2": "down"}
_TOP = {EMBEDDING: "embedding", FINAL_NORM: "norm", HEAD: "head"}


@dataclass(frozen=True)
class Place:
    """Rows `start` to `stop` of the weight of `module`."""

    module: str
    start: int
    stop: int


def layout(config: ModelConfig) -> dict[str, Place]:
    """The place of every tensor of the inventory; together they fill every module exactly."""
    filled: dict[str, int] = {}
    places = {}
    for spec in inventory(config):
        module = _module(spec.module_name, spec.name)
        start = filled.get(module, 0)
        filled[module] = start + spec.shape[0]
        places[spec.name] = Place(module, start, filled[module])
    return places


def by_module(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Each module with the names of its tensors, in the order of their rows."""
    parts: dict[str, list[str]] = {}
    for name, place in layout(config).items():
        parts.setdefault(place.module, []).append(name)
    return iter(parts.items())


def _module(name: str, tensor: str) -> str:
    if tensor in _TOP:
        return _TOP[tensor]
    _, _, layer, rest = name.split(".", 3)
    prefix, _, matrix = rest.rpartition(".")
    if prefix.startswith("block_sparse_moe.experts."):
        expert = prefix.removeprefix("block_sparse_moe.experts.")
        return f"layers.{layer}.moe.experts.{expert}.{_EXPERT_MODULES[matrix]}"
    return f"layers.{layer}.{_MODULES[rest]}"
