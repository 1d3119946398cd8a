"""Other tools' tensor names become the released ones, and nothing else does."""

import pytest

from minibble.quantize.names import canonical_name, fused_parts

LAYER = "model.layers.12."
EXPERT = LAYER + "block_sparse_moe.experts.3."


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (LAYER + "mlp.gate.weight", LAYER + "block_sparse_moe.gate.weight"),
        (LAYER + "mlp.experts.3.w1.weight", EXPERT + "w1.weight"),
        (LAYER + "mlp.experts.3.gate_proj.weight", EXPERT + "w1.weight"),
        (LAYER + "mlp.experts.3.up_proj.weight", EXPERT + "w3.weight"),
        (LAYER + "mlp.experts.3.down_proj.weight", EXPERT + "w2.weight"),
        (LAYER + "block_sparse_moe.experts.3.gate_proj.weight", EXPERT + "w1.weight"),
        (LAYER + "block_sparse_moe.experts.3.up_proj.weight.absmax", EXPERT + "w3.weight.absmax"),
        (
            LAYER + "mlp.experts.3.down_proj.weight.quant_state.bitsandbytes__nf4",
            EXPERT + "w2.weight.quant_state.bitsandbytes__nf4",
        ),
    ],
)
def test_aliases(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        LAYER + "self_attn.qkv_proj.weight",
        LAYER + "self_attn.norm.weight",
        LAYER + "self_attn.o_proj.weight.nested_absmax",
        LAYER + "input_layernorm.weight",
        EXPERT + "w2.weight",
        LAYER + "block_sparse_moe.gate.weight",
        # unknown ones come back as they are, for the inventory to refuse
        "model.layers.1.self_attn.q_norm.weight",
        "something.else",
        "slope_rate",
        "xmodel.layers.1.self_attn.slope_rate",
        LAYER + "mlp_slope_rate",
    ],
)
def test_others_stay(name: str) -> None:
    assert canonical_name(name) == name


@pytest.mark.parametrize("buffer", ["slope_rate", "query_decay", "key_decay", "diagonal_decay"])
def test_derived_buffers_are_ignored(buffer: str) -> None:
    assert canonical_name(f"{LAYER}self_attn.{buffer}") is None


def test_canonical_names_are_fixed_points() -> None:
    for name in (EXPERT + "w1.weight", LAYER + "mlp.experts.0.up_proj.weight", LAYER + "mlp.gate.weight"):
        once = canonical_name(name)
        assert once is not None and canonical_name(once) == once


@pytest.mark.parametrize("module", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_gate_and_up(module: str, suffix: str) -> None:
    parts = fused_parts(f"{LAYER}{module}.experts.gate_up_proj{suffix}", 2, 96, 64)
    names = [f"{LAYER}block_sparse_moe.experts.{e}.{w}.weight" for e in range(2) for w in ("w1", "w3")]
    assert parts is not None
    assert [tuple(part) for part in parts] == [
        (names[0], 0, 0, 96),
        (names[1], 0, 96, 192),
        (names[2], 1, 0, 96),
        (names[3], 1, 96, 192),
    ]


def test_fused_down() -> None:
    parts = fused_parts(f"{LAYER}mlp.experts.down_proj", 3, 96, 64)
    assert parts is not None
    assert [tuple(p) for p in parts] == [(f"{LAYER}block_sparse_moe.experts.{e}.w2.weight", e, 0, 64) for e in range(3)]


@pytest.mark.parametrize("name", [EXPERT + "w1.weight", LAYER + "mlp.experts.0.down_proj.weight", "lm_head.weight"])
def test_not_fused(name: str) -> None:
    assert fused_parts(name, 4, 96, 64) is None
