"""The inventory: counts of the released model, and every name and shape written out once more by hand."""

from collections import Counter
from typing import Any

import pytest

from minibble.quantize.builtin import builtin_config
from minibble.quantize.config import ModelConfig
from minibble.quantize.inventory import active_parameters, inventory, quantized_roles

REAL = "minimax-text-01"


@pytest.mark.parametrize("name", ["minimax-text-01", "minimax-m1"])
def test_counts_of_the_released_model(name: str) -> None:
    config = builtin_config(name)
    specs = inventory(config)
    assert len(specs) == 8_243
    assert sum(spec.numel for spec in specs) == 456_089_655_296
    assert round(active_parameters(config) / 1e9, 3) == 45.945 or round(active_parameters(config) / 1e6) == 45_945


def test_parameters_by_role() -> None:
    counts: Counter[str] = Counter()
    for spec in inventory(builtin_config(REAL)):
        counts[spec.role] += spec.numel
    assert counts == {
        "expert": 434_865_438_720,
        "attention": 17_616_076_800 + 1_132_462_080,
        "router": 15_728_640,
        "norm": 1_562_624,
        "embedding": 2_458_386_432 // 2,
        "head": 2_458_386_432 // 2,
    }


def test_shapes_of_the_released_model() -> None:
    shapes = {spec.name: spec.shape for spec in inventory(builtin_config(REAL))}
    layer = "model.layers.0."
    assert shapes[layer + "self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes[layer + "self_attn.out_proj.weight"] == (6144, 8192)
    assert shapes[layer + "self_attn.output_gate.weight"] == (8192, 6144)
    assert shapes[layer + "self_attn.norm.weight"] == (8192,)
    assert shapes[layer + "block_sparse_moe.gate.weight"] == (32, 6144)
    assert shapes[layer + "block_sparse_moe.experts.31.w1.weight"] == (9216, 6144)
    assert shapes[layer + "block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert shapes[layer + "block_sparse_moe.experts.31.w3.weight"] == (9216, 6144)
    softmax = "model.layers.79.self_attn."
    assert shapes[softmax + "q_proj.weight"] == (8192, 6144)
    assert shapes[softmax + "k_proj.weight"] == (1024, 6144)
    assert shapes[softmax + "v_proj.weight"] == (1024, 6144)
    assert shapes[softmax + "o_proj.weight"] == (6144, 8192)
    assert softmax + "qkv_proj.weight" not in shapes
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert shapes[name] == (200064, 6144)
    assert shapes["model.norm.weight"] == (6144,)


@pytest.mark.parametrize("spelling", ["original", "hf"])
def test_names_of_a_tiny_model(spelling: str, tiny_config: Any) -> None:
    config = ModelConfig.from_dict(tiny_config(spelling))
    specs = inventory(config)
    names = [spec.name for spec in specs]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, kind in enumerate(config.attention):
        prefix = f"model.layers.{layer}."
        expected |= {prefix + "input_layernorm.weight", prefix + "post_attention_layernorm.weight"}
        parts = "qkv_proj out_proj output_gate norm" if kind == "lightning" else "q_proj k_proj v_proj o_proj"
        expected |= {f"{prefix}self_attn.{part}.weight" for part in parts.split()}
        expected.add(prefix + "block_sparse_moe.gate.weight")
        experts = range(config.num_experts)
        expected |= {f"{prefix}block_sparse_moe.experts.{e}.{w}.weight" for e in experts for w in ("w1", "w2", "w3")}
    assert len(names) == len(set(names))
    assert set(names) == expected
    for spec in specs:
        parts = spec.name.split(".")
        assert spec.layer == (int(parts[2]) if "layers" in parts else None)
        assert spec.expert == (int(parts[5]) if "experts" in parts else None)
        assert spec.module_name + ".weight" == spec.name


def test_order_is_that_of_the_files() -> None:
    specs = inventory(builtin_config(REAL))
    assert specs[0].role == "embedding"
    assert [spec.role for spec in specs[-2:]] == ["norm", "head"]
    layers = [spec.layer for spec in specs if spec.layer is not None]
    assert layers == sorted(layers)


def test_what_becomes_4_bit() -> None:
    specs = inventory(builtin_config(REAL))
    matrices = [spec for spec in specs if spec.role in quantized_roles()]
    assert len(matrices) == 80 * 32 * 3 + 70 * 3 + 10 * 4
    assert {spec.role for spec in matrices} == {"attention", "expert"}
    assert all(len(spec.shape) == 2 for spec in matrices)
    assert quantized_roles(True, True) - quantized_roles() == {"head", "embedding"}
    assert quantized_roles(quantize_head=True) - quantized_roles() == {"head"}
