"""Configurations and the tiny model that come with the package."""

from pathlib import Path
from typing import Any

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import ConfigError

DEMO = "demo"


def _released(model_type: str) -> dict[str, Any]:
    """The released `config.json` of MiniMax-Text-01 and MiniMax-M1, which share one architecture."""
    alpha = 3.5565588200778455  # (2 * 80) ** 0.25
    return {
        "model_type": model_type,
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 200064,
        "attn_type_list": ([0] * 7 + [1]) * 10,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "rotary_dim": 64,
        "rope_theta": 10000000,
        "layernorm_full_attention_alpha": alpha,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": alpha,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": alpha,
        "layernorm_mlp_beta": 1.0,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 10240000,
        "shared_intermediate_size": 0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }


BUILTIN = {
    "minimax-text-01": _released("minimax_text_01"),
    "minimax-m1": _released("minimax_m1"),
}


def builtin_config(name: str) -> ModelConfig:
    """The built-in configuration `name`; ConfigError lists the known names."""
    if name not in BUILTIN:
        raise ConfigError(f"'{name}' is no built-in model; there are {', '.join((*BUILTIN, DEMO))}")
    return ModelConfig.from_dict(BUILTIN[name], where=name)


def demo_path() -> Path:
    """Folder of the built-in trained model, a 16-bit checkpoint."""
    import minibble

    return Path(minibble.__file__).parent / "data" / "demo"


def resolve_source(name_or_path: str | Path) -> Path:
    """The folder meant by `name_or_path`: `demo` is the built-in model unless a folder of that name exists."""
    path = Path(name_or_path)
    if str(name_or_path) == DEMO and not (path / "config.json").exists():
        return demo_path()
    return path
