"""Reading `config.json` in either spelling, and refusing what is another model."""

import json
from pathlib import Path
from typing import Any

import pytest

from minibble.quantize.builtin import BUILTIN, builtin_config
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import ConfigError

ALPHA = (2 * 80) ** 0.25

ORIGINAL: dict[str, Any] = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}

HF: dict[str, Any] = {
    "architectures": ["MiniMaxForCausalLM"],
    "attention_dropout": 0.0,
    "block_size": 256,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "full_attn_alpha_factor": 3.5565588200778455,
    "full_attn_beta_factor": 1.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
    "linear_attn_alpha_factor": 3.5565588200778455,
    "linear_attn_beta_factor": 1.0,
    "max_position_embeddings": 10240000,
    "mlp_alpha_factor": 3.5565588200778455,
    "mlp_beta_factor": 1.0,
    "model_type": "minimax",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000000, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 200064,
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("raw", [ORIGINAL, HF], ids=["original", "hf"])
def test_reads_the_released_config(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    assert config.model_type == raw["model_type"]
    assert config.attention == (("lightning",) * 7 + ("softmax",)) * 10
    assert (config.rotary_dim, config.rope_theta) == (64, 1e7)
    for part in ("lightning", "softmax", "mlp"):
        assert getattr(config, f"{part}_alpha") == ALPHA
        assert getattr(config, f"{part}_beta") == 1.0
    assert (config.num_experts, config.experts_per_token, config.rms_norm_eps) == (32, 2, 1e-5)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (64, 8, 128)
    assert config.raw == raw


def test_both_spellings_mean_the_same_model() -> None:
    original, hf = ModelConfig.from_dict(ORIGINAL), ModelConfig.from_dict(HF)
    differing = {name for name in vars(original) if getattr(original, name) != getattr(hf, name)}
    assert differing == {"model_type", "raw", "slopes"}  # the slopes' rules are one for a power of two of heads


def test_every_alpha_is_read_from_its_own_key() -> None:
    keys = {
        "lightning_alpha": ("layernorm_linear_attention_alpha", "linear_attn_alpha_factor"),
        "lightning_beta": ("layernorm_linear_attention_beta", "linear_attn_beta_factor"),
        "softmax_alpha": ("layernorm_full_attention_alpha", "full_attn_alpha_factor"),
        "softmax_beta": ("layernorm_full_attention_beta", "full_attn_beta_factor"),
        "mlp_alpha": ("layernorm_mlp_alpha", "mlp_alpha_factor"),
        "mlp_beta": ("layernorm_mlp_beta", "mlp_beta_factor"),
    }
    for which, raw in enumerate((ORIGINAL, HF)):
        values = {spellings[which]: 2.0 + i for i, spellings in enumerate(keys.values())}
        config = ModelConfig.from_dict(raw | values)
        assert [getattr(config, name) for name in keys] == [2.0 + i for i in range(6)]


@pytest.mark.parametrize("name", ["minimax-text-01", "minimax-m1"])
def test_builtin_configs(name: str) -> None:
    config = builtin_config(name)
    assert config.model_type == name.replace("-", "_")
    reference = ModelConfig.from_dict(ORIGINAL | {"model_type": config.model_type})
    assert config == reference
    assert name in BUILTIN


def test_unknown_builtin_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"minimax-text-01.*minimax-m1"):
        builtin_config("minimax-text-02")


def test_rotary_dim_from_a_factor() -> None:
    assert ModelConfig.from_dict(HF | {"partial_rotary_factor": 0.5}).rotary_dim == 64
    rope = {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25}
    assert ModelConfig.from_dict(HF | {"rope_parameters": rope}).rotary_dim == 32
    assert ModelConfig.from_dict(HF | {"rotary_dim": 48}).rotary_dim == 48


def test_rotary_dim_from_nothing() -> None:
    """A conversion drops the key: the released size means 64 of 128; any other model rotates the whole head."""
    assert ModelConfig.from_dict(HF).rotary_dim == 64
    small = HF | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    assert ModelConfig.from_dict(small).rotary_dim == 64
    assert ModelConfig.from_dict(small | {"head_dim": 128}).rotary_dim == 128


@pytest.mark.parametrize("value", [0, -2, 130, 33, True, "64", 64.0, [64]])
def test_bad_rotary_dim(value: Any) -> None:
    with pytest.raises(ConfigError, match="rotary_dim"):
        ModelConfig.from_dict(ORIGINAL | {"rotary_dim": value})


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan"), "half", True])
def test_bad_partial_rotary_factor(value: Any) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(HF | {"partial_rotary_factor": value})


def test_rotary_dim_and_factor_that_disagree() -> None:
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        ModelConfig.from_dict(ORIGINAL | {"partial_rotary_factor": 0.25})


SAME_REFUSALS = [
    {"model_type": "minimax_m2"},
    {"model_type": "mixtral"},
    {"model_type": None},
    {"shared_intermediate_size": 1024},
    {"sliding_window": 4096},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e7, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "factor": 2.0}},
    {"hidden_act": "gelu"},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"use_qk_norm": True},
    {"scoring_func": "sigmoid"},
    {"num_mtp_modules": 3},
    {"logit_softcapping": 30.0},
    {"attention_sink_bias": 0.5},
    {"n_shared_experts": 1},
    {"hidden_size": 0},
    {"hidden_size": "6144"},
    {"hidden_size": True},
    {"layer_types": ["linear_attention"] * 79, "attn_type_list": [0] * 79},
    {"num_key_value_heads": 7},
    {"num_experts_per_tok": 33},
    {"rms_norm_eps": 0.0},
    {"rms_norm_eps": float("nan")},
]


@pytest.mark.parametrize("raw", [ORIGINAL, HF], ids=["original", "hf"])
@pytest.mark.parametrize("change", SAME_REFUSALS, ids=str)
def test_refuses(raw: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw | change, where="folder/config.json")
    assert "folder/config.json" in str(error.value)
    assert any(key.split("_")[0] in str(error.value) for key in change)


@pytest.mark.parametrize("key", [key for key in ORIGINAL if key.startswith("layernorm_")])
def test_original_spelling_needs_every_alpha(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(without(ORIGINAL, key))


@pytest.mark.parametrize("key", ["attn_type_list", "hidden_size", "vocab_size", "num_local_experts", "rope_theta"])
def test_names_what_is_missing(key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace("num_local_", "")):
        ModelConfig.from_dict(without(ORIGINAL, key))


@pytest.mark.parametrize("value", [[0] * 79, [0] * 79 + [2], [0] * 79 + ["1"], None, 0])
def test_bad_attention_lists(value: Any) -> None:
    with pytest.raises(ConfigError, match="attn_type_list"):
        ModelConfig.from_dict(ORIGINAL | {"attn_type_list": value})


def test_harmless_keys_are_accepted() -> None:
    config = HF | {"_name_or_path": "", "id2label": {"0": "LABEL_0"}, "pruned_heads": {}, "pad_token_id": 1}
    assert ModelConfig.from_dict(config).pad_token_id == 1
    assert ModelConfig.from_dict(HF | {"eos_token_id": [1, 2]}).eos_token_id == (1, 2)


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ORIGINAL))
    assert ModelConfig.from_file(path) == ModelConfig.from_dict(ORIGINAL)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}'])
def test_from_broken_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_file(path)
    with pytest.raises(ConfigError, match=r"missing\.json"):
        ModelConfig.from_file(tmp_path / "missing.json")
