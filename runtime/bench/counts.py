"""Floating-point operations and bytes of a layer, counted from the config: the floors that times are compared with."""

from minibble.quantize.config import ModelConfig
from minibble.quantize.formats import Format


def layer_flops(config: ModelConfig, layer: int, tokens: int, past: int = 0) -> dict[str, int]:
    """Operations, two a multiply-add, of `tokens` new tokens of a sequence in `layer`, by part.

    Lightning attention counts its recurrence: k^T v and q S, whatever a kernel computes beyond that within its blocks.
    Softmax attention counts only what causality lets a token see.
    """
    H, K, D = config.num_attention_heads, config.head_dim, config.hidden_size
    lightning = config.attention[layer] == "lightning"
    seen = tokens * past + tokens * (tokens + 1) // 2
    return {
        "projections": 2 * tokens * D * (projected_rows(config, layer) + H * K),
        "attention": 4 * tokens * H * K * K if lightning else 4 * seen * H * K,
        "router": 2 * tokens * D * config.num_experts,
        "experts": 2 * tokens * config.experts_per_token * 3 * D * config.intermediate_size,
    }


def projected_rows(config: ModelConfig, layer: int) -> int:
    """Rows of the matrix through which `layer` projects: q, k, v and, in a lightning layer, the gate."""
    HK = config.num_attention_heads * config.head_dim
    if config.attention[layer] == "lightning":
        return 4 * HK
    return HK + 2 * config.num_key_value_heads * config.head_dim


def decode_nbytes(config: ModelConfig, layer: int, format: Format, context: int, batch: int = 1) -> dict[str, int]:
    """Bytes that a token of each of `batch` sequences must read or write in `layer`, by part.

    Weights are read once; of experts those of one token, whatever the batch. A lightning state is read and written in
    float32, keys and values of `context` tokens are read in 16 bits.
    """
    H, K, D = config.num_attention_heads, config.head_dim, config.hidden_size
    F, A = config.intermediate_size, config.experts_per_token
    lightning = config.attention[layer] == "lightning"
    state = 2 * 4 * H * K * K if lightning else 2 * 2 * config.num_key_value_heads * K * context
    return {
        "attention": format.held_nbytes((projected_rows(config, layer), D)) + format.held_nbytes((D, H * K)),
        "experts": A * (2 * format.held_nbytes((F, D)) + format.held_nbytes((D, F))),
        "router": 4 * D * config.num_experts,
        "state": batch * state,
    }
