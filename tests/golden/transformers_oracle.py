"""transformers' own `minimax` port, mended where it departs from the released model: a second opinion.

Only to be used in float32, without padding and without a cache: its decays follow the load dtype and its
cache reports length 0. Mended from outside, so that it works alike in every release of transformers 5:

- *Partial rotary.* The port rotates all K features of a head, pairing feature i with i + K/2. Attention
  scores do not change when the features of q and k are put in another order, so the rows of q_proj and
  k_proj are permuted until the pairs (i, i + rotary_dim/2) of the released model stand K/2 apart; all other
  pairs get frequency 0.
- *Slopes* of a model in the original spelling whose number of heads is no power of two: the original code
  follows ALiBi's rule there, the port continues the geometric one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from golden.float64_loop import slopes
from torch import Tensor


def permutation(head_dim: int, rotary_dim: int) -> list[int]:
    """Where each feature of a permuted head comes from: [0..r/2), half the rest, [r/2..r), the other half."""
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = [*range(half), *range(rotary_dim, rotary_dim + rest)]
    second = [*range(half, rotary_dim), *range(rotary_dim + rest, head_dim)]
    return first + second


def hf_config(config: Any) -> Any:
    """transformers' MiniMaxConfig of a `ModelConfig` (any object with its attributes)."""
    from transformers import MiniMaxConfig

    kind = {"lightning": "linear_attention", "softmax": "full_attention"}
    return MiniMaxConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_types=[kind[attention] for attention in config.attention],
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        linear_attn_alpha_factor=config.lightning_alpha,
        linear_attn_beta_factor=config.lightning_beta,
        full_attn_alpha_factor=config.softmax_alpha,
        full_attn_beta_factor=config.softmax_beta,
        mlp_alpha_factor=config.mlp_alpha,
        mlp_beta_factor=config.mlp_beta,
        block_size=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )


def build(config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, mend: bool = True) -> Any:
    """transformers' MiniMaxForCausalLM with `weights` (original names); without `mend`, as it comes."""
    from transformers import MiniMaxForCausalLM

    with torch.device("meta"):
        skeleton = MiniMaxForCausalLM(hf_config(config))
    wanted = set(skeleton.state_dict())
    del skeleton
    model = MiniMaxForCausalLM(hf_config(config)).to(dtype).eval()
    state = {name: tensor.to(dtype) for name, tensor in _their_names(config, weights)}
    if mend and config.rotary_dim != config.head_dim:
        _permute_heads(config, state)
    derived = {name for name in wanted if name.rsplit(".", 1)[-1].endswith(("slope_rate", "_decay"))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - derived or unexpected:
        raise AssertionError(f"oracle weights: missing {set(missing) - derived}, unexpected {unexpected}")
    if mend:
        _mend_frequencies(config, model)
        if config.model_type != "minimax":
            _mend_slopes(config, model)
    return model


@torch.no_grad()
def logits(config: Any, weights: Mapping[str, Tensor], prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 logits [T, V] of each prompt, one at a time: no padding, no cache."""
    model = build(config, weights)
    return [model(input_ids=torch.tensor([list(p)]), use_cache=False).logits[0] for p in prompts]


def _their_names(config: Any, weights: Mapping[str, Tensor]):
    for name, tensor in weights.items():
        if "block_sparse_moe.experts" not in name:
            yield name.replace("block_sparse_moe.gate", "mlp.gate"), tensor
    for layer in range(config.num_hidden_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts."
        w1, w2, w3 = (
            torch.stack([weights[f"{experts}{e}.{w}.weight"] for e in range(config.num_experts)])
            for w in ("w1", "w2", "w3")
        )
        yield f"model.layers.{layer}.mlp.experts.gate_up_proj", torch.cat([w1, w3], dim=1)
        yield f"model.layers.{layer}.mlp.experts.down_proj", w2


def _permute_heads(config: Any, state: dict[str, Tensor]) -> None:
    order = torch.tensor(permutation(config.head_dim, config.rotary_dim))
    for name in [n for n in state if n.endswith(("q_proj.weight", "k_proj.weight"))]:
        heads = state[name].view(-1, config.head_dim, config.hidden_size)
        state[name] = heads[:, order].reshape(-1, config.hidden_size)


def _mend_frequencies(config: Any, model: Any) -> None:
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    inv_freq = torch.zeros(config.head_dim // 2, dtype=torch.float64)
    inv_freq[: config.rotary_dim // 2] = config.rope_theta**-exponent
    rotary = model.model.rotary_emb
    rotary.inv_freq = inv_freq.float()
    rotary.original_inv_freq = inv_freq.float()


def _mend_slopes(config: Any, model: Any) -> None:
    for layer, kind in enumerate(config.attention):
        if kind != "lightning":
            continue
        attention = model.model.layers[layer].self_attn
        factor = 1 - layer / (config.num_hidden_layers - 1) + 1e-5
        slope = torch.tensor(slopes(config.num_attention_heads, config.model_type), dtype=torch.float64) * factor
        slope = slope.float()[:, None, None]
        attention.slope_rate = slope
        attention.query_decay, attention.key_decay, attention.diagonal_decay = attention.decay_factors(slope)
