"""The inventory: every tensor of the model, from the config alone.

Parameter counts, completeness checks, footprints, the choice of what to quantize and the placement all derive
from this one list. Names are those of the released checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from minibble.quantize.config import ModelConfig

Role = Literal["embedding", "head", "norm", "router", "attention", "expert"]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model: `shape` is [out, in] for matrices; `layer` and `expert` are 0-based."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def module_name(self) -> str:
        """The name without its final `.weight`."""
        return self.name.removesuffix(".weight")


def inventory(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """All tensors in the order in which files hold them: embedding, layers, final norm, head."""
    table = (config.vocab_size, config.hidden_size)
    specs = [TensorSpec(EMBEDDING, table, "embedding")]
    for layer in range(config.num_hidden_layers):
        specs.extend(_layer(config, layer))
    specs.append(TensorSpec(FINAL_NORM, (config.hidden_size,), "norm"))
    specs.append(TensorSpec(HEAD, table, "head"))
    return tuple(specs)


def quantized_roles(quantize_head: bool = False, quantize_embedding: bool = False) -> frozenset[Role]:
    """Roles stored in 4 bits; routers and norms always stay in 16."""
    roles: set[Role] = {"attention", "expert"}
    if quantize_head:
        roles.add("head")
    if quantize_embedding:
        roles.add("embedding")
    return frozenset(roles)


def active_parameters(config: ModelConfig) -> int:
    """Parameters used for one token as the model card counts them: the chosen experts and all the layers'
    other tensors, without embedding and head."""
    counts = {"expert": 0, "layers": 0}
    for spec in inventory(config):
        if spec.layer is not None:
            counts["expert" if spec.role == "expert" else "layers"] += spec.numel
    return counts["layers"] + counts["expert"] * config.experts_per_token // config.num_experts


def _layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    D, F = config.hidden_size, config.intermediate_size
    prefix = f"model.layers.{layer}."
    yield TensorSpec(prefix + "input_layernorm.weight", (D,), "norm", layer)
    for name, shape in _attention(config, layer).items():
        role: Role = "norm" if name == "norm" else "attention"
        yield TensorSpec(f"{prefix}self_attn.{name}.weight", shape, role, layer)
    yield TensorSpec(prefix + "post_attention_layernorm.weight", (D,), "norm", layer)
    yield TensorSpec(prefix + "block_sparse_moe.gate.weight", (config.num_experts, D), "router", layer)
    for expert in range(config.num_experts):
        for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
            full = f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"
            yield TensorSpec(full, shape, "expert", layer, expert)


def _attention(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    D, HK = config.hidden_size, config.num_attention_heads * config.head_dim
    if config.attention[layer] == "lightning":
        return {"qkv_proj": (3 * HK, D), "output_gate": (HK, D), "out_proj": (D, HK), "norm": (HK,)}
    GK = config.num_key_value_heads * config.head_dim
    return {"q_proj": (HK, D), "k_proj": (GK, D), "v_proj": (GK, D), "o_proj": (D, HK)}
