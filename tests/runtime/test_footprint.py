"""Bytes from the config alone: the figures of the released model, and the bytes that are really written."""

import pytest

from minibble.quantize.builtin import builtin_config
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import ConfigError
from minibble.quantize.formats import FORMATS
from minibble.quantize.inventory import inventory
from minibble.runtime.footprint import (
    FORMAT_NAMES,
    FORMAT_NOTES,
    PARTS,
    footprint,
    footprints,
    kv_cache_bytes,
    parameters_by_part,
    part_of,
    state_bytes,
)


@pytest.fixture(scope="module", params=["minimax-text-01", "minimax-m1"])
def real(request) -> ModelConfig:
    return builtin_config(request.param)


def test_parameters_of_the_released_model(real) -> None:
    assert len(inventory(real)) == 8243
    parts = parameters_by_part(real)
    assert parts["experts"] == 434_865_438_720
    assert parts["attention"] == 17_616_076_800 + 1_132_462_080
    assert parts["embeddings"] == 2_458_386_432
    assert parts["other"] == 15_728_640 + 1_562_624
    assert sum(parts.values()) == footprint(real).parameters == 456_089_655_296


@pytest.mark.parametrize(
    ("format", "gb", "gib"),
    [
        ("bf16", 912.2, 849.5),
        ("nf4", 260.1, 242.3),
        ("nf4-dq", 239.0, 222.6),
        ("nf4-dq-all", 235.3, 219.2),
        ("int4-g128", 240.8, 224.3),
    ],
)
def test_bytes_of_the_released_model(real, format: str, gb: float, gib: float) -> None:
    weights = footprint(real, format)
    assert round(weights.total_bytes / 1e9, 1) == gb
    # 242.25 GiB is 242.2 or 242.3 by how one rounds.
    assert abs(weights.total_bytes / 2**30 - gib) < 0.06
    assert weights.bits_per_weight == weights.total_bytes * 8 / 456_089_655_296
    assert sum(weights.parts.values()) == weights.total_bytes


def test_cache_and_state_of_the_released_model(real) -> None:
    assert kv_cache_bytes(real, context=1) == 40_960
    assert kv_cache_bytes(real, context=8192, batch=3) == 40_960 * 8192 * 3
    assert kv_cache_bytes(real, context=1, itemsize=4) == 81_920
    assert state_bytes(real) == 293_601_280
    assert state_bytes(real, batch=5) == 5 * 293_601_280


def test_4_bit_embeddings_change_nothing_else(real) -> None:
    some, all_ = footprint(real, "nf4-dq"), footprint(real, "nf4-dq-all")
    assert {part for part in PARTS if some.parts[part] != all_.parts[part]} == {"embeddings"}


def test_routers_and_norms_stay_in_16_bit(real) -> None:
    other = sum(spec.numel for spec in inventory(real) if spec.role in ("router", "norm"))
    assert {footprint(real, name).parts["other"] for name in FORMAT_NAMES} == {2 * other}


def test_every_tensor_belongs_to_a_part(real) -> None:
    assert {part_of(spec) for spec in inventory(real)} == set(PARTS)
    assert set(FORMAT_NOTES) == set(FORMAT_NAMES)


def test_the_formats_of_a_report_are_those_that_there_are() -> None:
    assert set(FORMAT_NAMES) == {*FORMATS, "nf4-dq-all"}


def test_formats_that_cannot_hold_the_model_are_left_out(tiny_config) -> None:
    narrow = ModelConfig.from_dict(tiny_config())  # rows of 64
    assert set(footprints(narrow)) == set(FORMAT_NAMES) - {"int4-g128"}
    assert set(footprints(ModelConfig.from_dict(tiny_config(hidden_size=128, head_dim=32)))) == set(FORMAT_NAMES)
    with pytest.raises(ConfigError, match=r"64; int4 needs .* groups of 128"):
        footprint(narrow, "int4-g128")


def test_unknown_format_is_refused(real) -> None:
    with pytest.raises(ConfigError, match="unknown format 'int3'; there are bf16"):
        footprint(real, "int3")
