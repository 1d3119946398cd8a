"""What transformers' generation wants to know of the model, in its own words."""

from typing import Any

import torch
from transformers import PretrainedConfig

from minibble.quantize.config import ModelConfig


class RuntimeConfig(PretrainedConfig):
    """The part that transformers asks for; the whole config is the model's `minibble`."""

    model_type = "minibble"


def presented(config: ModelConfig, dtype: torch.dtype) -> RuntimeConfig:
    """`config` as transformers spells it."""
    eos = config.eos_token_id
    known: dict[str, Any] = {
        "architectures": ["MiniMaxForCausalLM"],
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": False,
        "is_decoder": True,
        "use_cache": True,
    }
    return RuntimeConfig(**known)
