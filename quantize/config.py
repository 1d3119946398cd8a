"""The model's shape and constants, read strictly from either spelling of `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minibble.quantize.errors import ConfigError

Attention = Literal["lightning", "softmax"]
Slopes = Literal["alibi", "geometric"]

ORIGINAL_TYPES = ("minimax_text_01", "minimax_m1")
HF_TYPE = "minimax"

# A key of the released config -> its Hugging Face spelling.
_ALPHAS = {
    "lightning_alpha": ("layernorm_linear_attention_alpha", "linear_attn_alpha_factor"),
    "lightning_beta": ("layernorm_linear_attention_beta", "linear_attn_beta_factor"),
    "softmax_alpha": ("layernorm_full_attention_alpha", "full_attn_alpha_factor"),
    "softmax_beta": ("layernorm_full_attention_beta", "full_attn_beta_factor"),
    "mlp_alpha": ("layernorm_mlp_alpha", "mlp_alpha_factor"),
    "mlp_beta": ("layernorm_mlp_beta", "mlp_beta_factor"),
}

# Keys that would change the mathematics, and the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "shared_intermediate_size": (0, None),
    "n_shared_experts": (0, None),
    "num_shared_experts": (0, None),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "hidden_act": ("silu",),
    "postnorm": (True,),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "num_mtp_modules": (0, None),
    "mtp_transformer_layers": (0, None),
    "scoring_func": ("softmax", None),
    "norm_topk_prob": (True, None),
}

_EXPLAIN = {
    "shared_intermediate_size": "a shared expert is another architecture",
    "rope_scaling": "scaled rotary embeddings are not implemented",
    "sliding_window": "the released model attends to the whole context",
    "postnorm": "only the normed residual of the released model is implemented",
    "tie_word_embeddings": "the released model has a separate lm_head",
}

# Known keys without influence on what the model computes at inference.
_HARMLESS = {
    "attention_dropout", "attn_pdrop", "initializer_range", "layer_norm_eps", "output_attentions",
    "router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "shared_moe_mode", "block_size",
    "num_hidden_layers", "quantization_config", "attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation", "cross_attention_hidden_size", "add_cross_attention", "pruned_heads",
    "begin_suppress_tokens", "return_dict_in_generate", "output_scores", "is_encoder_decoder",
    "tie_encoder_decoder", "num_experts", "output_hidden_states",
}  # fmt: skip

# An unknown key with one of these in its name is refused: it may well change the result.
_SUSPECT = (
    "rope", "rotary", "norm", "attn", "attention", "expert", "moe", "router", "scal", "bias", "window",
    "alpha", "beta", "gate", "layer", "decay", "slope", "logit", "mtp", "residual", "head",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the model's tensors and mathematics. Sizes are element counts."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    attention: tuple[Attention, ...]
    num_experts: int
    experts_per_token: int
    rotary_dim: int
    rope_theta: float
    lightning_alpha: float
    lightning_beta: float
    softmax_alpha: float
    softmax_beta: float
    mlp_alpha: float
    mlp_beta: float
    rms_norm_eps: float
    max_position_embeddings: int
    slopes: Slopes  # decay of head h of H: 2^(-8 h / H), but the original code has ALiBi's rule unless H = 2^n
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read `path`, a `config.json`; ConfigError where it is unreadable or not this architecture."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Check and translate a parsed `config.json` in the original or the Hugging Face spelling."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, found {type(data).__name__}")
        reader = _Reader(data, where)
        reader.refuse_other_mathematics()
        hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
        head_dim = reader.count("head_dim", default=hidden // heads)
        layers = reader.count("num_hidden_layers")
        config = cls(
            model_type=reader.model_type,
            hidden_size=hidden,
            intermediate_size=reader.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=reader.count("num_key_value_heads"),
            head_dim=head_dim,
            vocab_size=reader.count("vocab_size"),
            attention=reader.attention(layers),
            num_experts=reader.count("num_local_experts", default=data.get("num_experts")),
            experts_per_token=reader.count("num_experts_per_tok"),
            rotary_dim=reader.rotary_dim(head_dim),
            rope_theta=reader.rope_theta(),
            **reader.alphas(),
            rms_norm_eps=reader.number("rms_norm_eps"),
            max_position_embeddings=reader.count("max_position_embeddings"),
            slopes="alibi" if reader.original else "geometric",
            bos_token_id=data.get("bos_token_id"),
            eos_token_id=_ids(data.get("eos_token_id")),
            pad_token_id=data.get("pad_token_id"),
            raw=dict(data),
        )
        config._check_consistency(where)
        return config

    def _check_consistency(self, where: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"{where}: num_experts_per_tok {self.experts_per_token} > num_local_experts {self.num_experts}"
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ConfigError(f"{where}: rotary_dim {self.rotary_dim} must be even and within head_dim {self.head_dim}")


class _Reader:
    """Typed access to a raw config, with errors that name the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str):
        self.data, self.where = data, where
        model_type = data.get("model_type")
        if model_type not in (*ORIGINAL_TYPES, HF_TYPE):
            known = ", ".join((*ORIGINAL_TYPES, HF_TYPE))
            raise ConfigError(f"{where}: model_type is {model_type!r}; supported are {known}")
        self.model_type: str = model_type
        self.original = self.model_type in ORIGINAL_TYPES

    def refuse_other_mathematics(self) -> None:
        for key, allowed in _NEUTRAL.items():
            value = self.data.get(key, allowed[0])
            if value not in allowed:
                reason = _EXPLAIN.get(key, "this changes the mathematics and is not implemented")
                raise ConfigError(f"{self.where}: {key} is {value!r}: {reason}")
        known = _HARMLESS | _NEUTRAL.keys() | {name for pair in _ALPHAS.values() for name in pair} | _READ
        for key, value in self.data.items():
            if key not in known and value is not None and any(part in key.lower() for part in _SUSPECT):
                raise ConfigError(
                    f"{self.where}: unknown key {key!r} = {value!r} may change the mathematics; "
                    "remove it if it has no effect"
                )

    def _value(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a positive number")
        return float(value)

    def alphas(self) -> dict[str, float]:
        which = 0 if self.original else 1
        return {name: self.number(spellings[which]) for name, spellings in _ALPHAS.items()}

    def attention(self, layers: int) -> tuple[Attention, ...]:
        key, kinds = ("attn_type_list", {0: "lightning", 1: "softmax"}) if self.original else (
            "layer_types", {"linear_attention": "lightning", "full_attention": "softmax"}
        )  # fmt: skip
        value = self._value(key)
        if not isinstance(value, list) or len(value) != layers or any(kind not in kinds for kind in value):
            raise ConfigError(
                f"{self.where}: {key} must list {layers} layers, each one of {list(kinds)}; found {value!r:.200}"
            )
        return tuple(kinds[kind] for kind in value)  # type: ignore[index, misc]

    def _rope(self) -> Mapping[str, Any]:
        rope = self.data.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            raise ConfigError(f"{self.where}: rope_parameters of type {kind!r}: {_EXPLAIN['rope_scaling']}")
        unknown = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if unknown:
            raise ConfigError(f"{self.where}: rope_parameters has unknown keys {sorted(unknown)}")
        return rope

    def rope_theta(self) -> float:
        return self.number("rope_theta", default=self._rope().get("rope_theta"))

    def rotary_dim(self, head_dim: int) -> int:
        factor = self.data.get("partial_rotary_factor", self._rope().get("partial_rotary_factor"))
        if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not factor <= 1):
            raise ConfigError(f"{self.where}: partial_rotary_factor is {factor!r}, expected a share of head_dim")
        given = self.count("rotary_dim") if self.data.get("rotary_dim") is not None else None
        if factor is not None:
            from_factor = int(head_dim * factor)
            if given not in (None, from_factor):
                raise ConfigError(
                    f"{self.where}: rotary_dim is {given}, but partial_rotary_factor {factor} of head_dim {head_dim} "
                    f"is {from_factor}; remove one of them"
                )
            return from_factor
        if given is not None:
            return given
        # Conversions drop the key, but weights of the released size were trained with 64 of 128 features rotated.
        released = (self.data.get("hidden_size"), self.data.get("num_hidden_layers"), head_dim)
        return 64 if released == (6144, 80, 128) else head_dim


_READ = {
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "attn_type_list", "layer_types", "num_local_experts", "num_experts_per_tok", "rotary_dim",
    "partial_rotary_factor", "rope_theta", "rope_parameters", "rms_norm_eps", "max_position_embeddings",
}  # fmt: skip


def _ids(value: Any) -> int | tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) else value
