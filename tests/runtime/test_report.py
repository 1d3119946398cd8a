"""The report on a config, and on a checkpoint to the byte."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime.report import memory_report

CONTRACT = {"parameters", "total_bytes", "bits_per_weight", "parts", "kv_cache_bytes", "state_bytes"}


def bytes_of_tensors(folder: Path) -> int:
    """Bytes of all tensors in a folder's files, as safetensors reads them."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_builtin_model() -> None:
    report = memory_report("minimax-text-01", context=1000, batch=2).to_json()
    assert report.keys() >= CONTRACT
    assert report["parameters"] == 456_089_655_296
    assert report["active_parameters"] // 10**7 == 4594
    assert report["format"] == "nf4-dq"
    assert not report["stored"]
    assert round(report["total_bytes"] / 1e9, 1) == 239.0
    assert report["kv_cache_bytes"] == 40_960 * 1000 * 2
    assert report["state_bytes"] == 293_601_280 * 2
    assert report["layers"] == {"lightning": 70, "softmax": 10}
    assert report["attention"].index("softmax") == 7
    assert set(report["formats"]) == {"bf16", "nf4", "nf4-dq", "nf4-dq-all", "int4-g128"}
    assert report["formats"]["nf4-dq"]["parts"] == report["parts"]
    json.dumps(report)


def test_config_without_weights(tmp_path, tiny_config) -> None:
    """A config.json, and a folder with nothing else, say what a checkpoint would."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("hf")))
    (tmp_path / "README.md").write_text("weights to come")
    by_file, by_folder = memory_report(tmp_path / "config.json"), memory_report(tmp_path)
    assert by_file.weights == by_folder.weights
    assert by_file.weights.format == "nf4-dq"
    assert memory_report(tmp_path, format="bf16").weights.bits_per_weight == 16


@pytest.mark.parametrize("names", ["original", "hf", "fused"])
def test_source_on_disk(tmp_path, make_source, names: str) -> None:
    source = make_source(tmp_path / "source", names=names)
    report = memory_report(source)
    assert report.stored
    assert report.weights.format == "16-bit"
    assert report.weights.total_bytes == bytes_of_tensors(source)
    assert report.weights.parts == report.formats["bf16"].parts


@pytest.mark.parametrize(
    ("settings", "format"),
    [
        ({"double_quant": False}, "nf4"),
        ({}, "nf4-dq"),
        ({"quantize_head": True, "quantize_embedding": True}, "nf4-dq-all"),
    ],
)
def test_4_bit_checkpoint_weighs_what_was_predicted(tmp_path, make_source, settings, format: str) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    predicted = memory_report(source, format=format)
    quantize_checkpoint(source, out, **settings)
    report = memory_report(out)
    assert report.stored
    assert report.weights.total_bytes == bytes_of_tensors(out)
    assert report.weights.parts == predicted.weights.parts == report.formats[format].parts


def test_interrupted_output_is_no_bare_config(tmp_path, make_source) -> None:
    source = make_source(tmp_path / "source")
    next(source.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError):
        memory_report(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        memory_report(tmp_path / "empty")


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'minimax' is no checkpoint folder.*minimax-text-01"):
        memory_report("minimax")


@pytest.mark.parametrize("sizes", [{"context": -1}, {"batch": 0}])
def test_impossible_sizes_are_refused(sizes) -> None:
    with pytest.raises(ConfigError, match="context"):
        memory_report("minimax-m1", **sizes)
