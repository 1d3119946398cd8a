"""The report on a config, and on a checkpoint to the byte."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from minibble.quantize.errors import BudgetError, CheckpointError, ConfigError
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


def test_placement_on_asked_gpus() -> None:
    asked = {"gpu_memory": 228 * 10**9, "gpus": (141 * 10**9, 141 * 10**9)}
    report = memory_report("minimax-text-01", context=1000, **asked).to_json()
    assert report.keys() >= CONTRACT | {"devices", "host_bytes", "disk_bytes"}
    assert report.keys() >= {"expected_hit_rate", "expected_decode_tokens_per_s"}
    assert [device["device"] for device in report["devices"]] == ["cuda:0", "cuda:1"]
    assert sum(device["total_bytes"] for device in report["devices"]) <= 228 * 10**9
    assert report["disk_bytes"] == 0 < report["host_bytes"] < 20 * 10**9
    json.dumps(report)
    alone = memory_report("minimax-text-01", gpu_memory=48 * 10**9).placement
    assert alone is not None and [device.budget_bytes for device in alone.devices] == [48 * 10**9]
    assert "devices" not in memory_report("minimax-text-01").to_json()


def test_placement_that_cannot_be() -> None:
    with pytest.raises(BudgetError, match="without any resident expert"):
        memory_report("minimax-text-01", gpu_memory=12 * 10**9)
    with pytest.raises(BudgetError, match="fit on no GPU"):
        memory_report("minimax-text-01", gpu_memory=24 * 10**9, host_memory=64 * 10**9)
    with pytest.raises(ConfigError, match="do not fit on GPUs"):
        memory_report("minimax-text-01", host_memory=64 * 10**9)


def test_no_placement_of_16_bit_experts(tmp_path, make_source, tiny_config) -> None:
    source = make_source(tmp_path / "source", tiny_config(hidden_size=128, head_dim=32))
    for target, format in ((source, None), ("minimax-text-01", "bf16")):
        with pytest.raises(ConfigError, match="only experts in 4 bits"):
            memory_report(target, format=format, gpu_memory=2 * 10**9)


@pytest.mark.parametrize("format", ["nf4-dq", "int4-g128"])
def test_placement_of_a_checkpoint(tmp_path, make_source, tiny_config, format: str | None) -> None:
    """What was asked about is placed."""
    source = make_source(tmp_path / "source", tiny_config(hidden_size=128, head_dim=32))
    placement = memory_report(source, format=format, gpu_memory=2 * 10**9).placement
    assert placement is not None
    record = 3 * 128 * 128 // 2
    assert record <= placement.record_bytes < 3 * record
    assert placement.resident == ((0, 1, 2, 3),) * 3


def test_calibrated_experts_are_placed_by_their_tokens(tmp_path, make_source, tiny_config) -> None:
    """Of the 12 experts all but a few fit, and the coldest of a layer are left out."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from golden.calibrated_manifest import calibrate_folder

    source = make_source(tmp_path / "source", tiny_config(num_local_experts=16, hidden_size=256, intermediate_size=256))
    out = quantize_checkpoint(source, tmp_path / "out").out
    tokens = calibrate_folder(out)["expert_tokens"]
    whole = memory_report(out, gpu_memory=2 * 10**9).placement
    assert whole is not None and whole.expected_hit_rate == 1
    whole = memory_report(out, gpu_memory=whole.total_bytes - 1).placement  # by smaller pieces of prompts
    assert whole is not None and whole.expected_hit_rate == 1
    budget = whole.total_bytes - 6 * whole.record_bytes
    placement = memory_report(out, gpu_memory=budget).placement
    assert placement is not None and sum(map(len, placement.pinned)) == 12  # six, four slots, poison, page tables
    for layer, (kept, left) in enumerate(zip(placement.resident, placement.pinned, strict=True)):
        coldest = min(tokens[layer][expert] for expert in kept)
        assert all(tokens[layer][expert] <= coldest for expert in left)
    assert placement.expected_hit_rate > 1 - 12 / 48
