"""Tiny models for the tests: configs in both spellings, weights that make every part of the model matter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VOCAB = 97


def hf_json(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny model in the Hugging Face spelling, plus `rotary_dim`."""
    layers = changes.get("num_hidden_layers", 8)
    config: dict[str, Any] = {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rotary_dim": 8,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "full_attn_alpha_factor": 1.7,
        "full_attn_beta_factor": 0.9,
        "linear_attn_alpha_factor": 1.9,
        "linear_attn_beta_factor": 1.1,
        "mlp_alpha_factor": 1.5,
        "mlp_beta_factor": 1.2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return config | changes


def original_json(**changes: Any) -> dict[str, Any]:
    """The same model in the spelling of the released checkpoints."""
    d = hf_json()
    config: dict[str, Any] = {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        "attn_type_list": [int(kind == "full_attention") for kind in d["layer_types"]],
        "rotary_dim": d["rotary_dim"],
        "rope_theta": d["rope_parameters"]["rope_theta"],
        "layernorm_full_attention_alpha": d["full_attn_alpha_factor"],
        "layernorm_full_attention_beta": d["full_attn_beta_factor"],
        "layernorm_linear_attention_alpha": d["linear_attn_alpha_factor"],
        "layernorm_linear_attention_beta": d["linear_attn_beta_factor"],
        "layernorm_mlp_alpha": d["mlp_alpha_factor"],
        "layernorm_mlp_beta": d["mlp_beta_factor"],
        "postnorm": True,
        "shared_intermediate_size": 0,
    }
    same = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "vocab_size num_local_experts num_experts_per_tok rms_norm_eps max_position_embeddings hidden_act "
        "sliding_window tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    return config | {key: d[key] for key in same.split()} | changes


def plain_config(**changes: Any) -> SimpleNamespace:
    """The attributes of a `ModelConfig`, read here by hand: the oracles depend on none of our code."""
    d = hf_json(**changes)
    kind = {"linear_attention": "lightning", "full_attention": "softmax"}
    keep = (
        "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim vocab_size rotary_dim rms_norm_eps max_position_embeddings"
    )
    return SimpleNamespace(
        **{key: d[key] for key in keep.split()},
        attention=tuple(kind[layer] for layer in d["layer_types"]),
        num_experts=d["num_local_experts"],
        experts_per_token=d["num_experts_per_tok"],
        rope_theta=d["rope_parameters"]["rope_theta"],
        lightning_alpha=d["linear_attn_alpha_factor"],
        lightning_beta=d["linear_attn_beta_factor"],
        softmax_alpha=d["full_attn_alpha_factor"],
        softmax_beta=d["full_attn_beta_factor"],
        mlp_alpha=d["mlp_alpha_factor"],
        mlp_beta=d["mlp_beta_factor"],
    )


def shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model by its original name; written out here, independent of `inventory`."""
    D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
    A, G = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, D)
    for layer, kind in enumerate(config.attention):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (D,)
        yield prefix + "post_attention_layernorm.weight", (D,)
        if kind == "lightning":
            yield prefix + "self_attn.qkv_proj.weight", (3 * A, D)
            yield prefix + "self_attn.out_proj.weight", (D, A)
            yield prefix + "self_attn.output_gate.weight", (A, D)
            yield prefix + "self_attn.norm.weight", (A,)
        else:
            yield prefix + "self_attn.q_proj.weight", (A, D)
            yield prefix + "self_attn.k_proj.weight", (G, D)
            yield prefix + "self_attn.v_proj.weight", (G, D)
            yield prefix + "self_attn.o_proj.weight", (D, A)
        yield prefix + "block_sparse_moe.gate.weight", (E, D)
        for e in range(E):
            yield f"{prefix}block_sparse_moe.experts.{e}.w1.weight", (F, D)
            yield f"{prefix}block_sparse_moe.experts.{e}.w2.weight", (D, F)
            yield f"{prefix}block_sparse_moe.experts.{e}.w3.weight", (F, D)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (config.vocab_size, D)


def random_weights(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights with variance 1/fan_in, norms around 1; peaked attention, so that positions matter.

    Every fourth layer is a quiet one: its q, k, v are so small that the 1e-6 of lightning's norm counts.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config):
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        if len(shape) == 1:
            tensor = 1 + 0.2 * noise
        elif "embed_tokens" in name:
            tensor = noise
        else:
            gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight", "gate.weight")) else 1.0
            if name.endswith("qkv_proj.weight") and int(name.split(".")[2]) % 4 == 1:
                gain = 0.2
            tensor = gain * noise / shape[1] ** 0.5
        weights[name] = tensor.to(dtype)
    return weights


def prompts(lengths: tuple[int, ...], vocab: int = VOCAB, seed: int = 7) -> list[list[int]]:
    """Random token ids, one list a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
