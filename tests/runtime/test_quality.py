"""What the manifest says about quality: of a rounded checkpoint, a calibrated one, the released size, damaged ones."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from golden.calibrated_manifest import CALIBRATION, calibrate_folder, calibrated, expert_tokens

from minibble.quantize.builtin import builtin_config, resolve_source
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import CheckpointError
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime.quality import Quality, read_quality
from minibble.runtime.report import memory_report

ATTENTION = ["qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT = ["w1", "w3", "w2"]
KEYS = {
    "calibration", "measure", "mean_relative_error", "mean_output_error", "by_matrix", "expert_tokens", "fallbacks",
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The built-in model, rounded to nearest."""
    quantize_checkpoint("demo", tmp_path / "demo")
    return tmp_path / "demo"


def quality_of(folder: Path) -> Quality:
    quality = memory_report(folder).quality
    assert quality is not None
    return quality


def test_rounded_to_nearest(checkpoint: Path) -> None:
    quality, manifest = quality_of(checkpoint), json.loads((checkpoint / "minibble.json").read_text())
    plain = quality.to_json()
    assert plain.keys() == KEYS
    assert plain["measure"] == "relative_error"
    assert plain["mean_relative_error"] == manifest["totals"]["mean_relative_error"]
    assert plain["calibration"] is plain["expert_tokens"] is plain["mean_output_error"] is None
    assert plain["fallbacks"] == quality.feeds() == []
    assert list(plain["by_matrix"]) == ATTENTION + EXPERT
    assert all(len(row) == 8 for row in plain["by_matrix"].values())
    assert plain["by_matrix"]["qkv_proj"][7] is plain["by_matrix"]["q_proj"][6] is None
    experts = [manifest["quantized"][f"model.layers.3.block_sparse_moe.experts.{e}.w2.weight"] for e in range(5)]
    errors = [record["relative_error"] for record in experts]
    assert plain["by_matrix"]["w2"][3] == pytest.approx(fmean(errors), rel=1e-5)
    cell = quality.by_matrix()["w2"][3]
    assert cell is not None
    assert cell.worst.spec.expert == errors.index(max(errors))
    assert quality.worst.relative_error == manifest["totals"]["max_relative_error"]


def test_calibrated(checkpoint: Path) -> None:
    manifest = calibrate_folder(checkpoint)
    plain = memory_report(checkpoint).to_json()["quality"]
    records = manifest["quantized"]
    assert plain["calibration"] == CALIBRATION
    assert plain["measure"] == "output_error"
    assert plain["mean_output_error"] == pytest.approx(fmean(r["output_error"] for r in records.values()), rel=1e-5)
    assert plain["mean_relative_error"] == pytest.approx(fmean(r["relative_error"] for r in records.values()), rel=1e-5)
    for matrix, row in plain["by_matrix"].items():
        for layer, mean in enumerate(row):
            named = re.compile(rf"model\.layers\.{layer}\.(\w+\.)+{matrix}\.weight")
            errors = [record["output_error"] for name, record in records.items() if named.fullmatch(name)]
            assert mean == (pytest.approx(fmean(errors), rel=1e-5) if errors else None)
    assert plain["expert_tokens"] == manifest["expert_tokens"]
    prefix = "model.layers.1.block_sparse_moe.experts.0"
    assert plain["fallbacks"] == [f"{prefix}.{matrix}.weight" for matrix in ("w1", "w2", "w3")]
    json.dumps(plain)


def test_shares_are_relative_to_an_even_distribution(checkpoint: Path) -> None:
    calibrate_folder(checkpoint)
    feeds = quality_of(checkpoint).feeds()
    assert [(feed.layer, feed.expert) for feed in feeds] == [(layer, e) for layer in range(8) for e in range(5)]
    for layer in range(8):
        assert sum(feed.share for feed in feeds if feed.layer == layer) == pytest.approx(5)
    least = min(feeds, key=lambda feed: feed.share)
    assert (least.layer, least.expert, least.tokens) == (1, 0, 3)
    assert least.share == pytest.approx(3 / (8 * 512 * 2 / 5))


def test_released_size(tmp_path: Path) -> None:
    config = builtin_config("minimax-text-01")
    (tmp_path / "minibble.json").write_text(json.dumps(calibrated(config)))
    quality = read_quality(tmp_path, config)
    assert quality is not None
    assert len(quality.records) == 80 * 32 * 3 + 70 * 3 + 10 * 4
    rows = quality.by_matrix()
    assert list(rows) == ATTENTION + EXPERT
    assert [sum(cell is not None for cell in row) for row in rows.values()] == [70] * 3 + [10] * 4 + [80] * 3
    assert [feed.tokens for feed in quality.feeds()] == [count for row in expert_tokens(config) for count in row]


def test_what_was_not_measured_does_not_count(checkpoint: Path) -> None:
    """An expert without tokens has no output error; neither has a cell whose experts all lack it."""
    manifest = calibrate_folder(checkpoint)
    for expert in range(5):
        del manifest["quantized"][f"model.layers.2.block_sparse_moe.experts.{expert}.w1.weight"]["output_error"]
    manifest["quantized"]["model.layers.4.block_sparse_moe.experts.4.w3.weight"]["output_error"] = None
    (checkpoint / "minibble.json").write_text(json.dumps(manifest))
    rows = quality_of(checkpoint).by_matrix()
    unmeasured, partly = rows["w1"][2], rows["w3"][4]
    assert unmeasured is not None
    assert partly is not None
    assert unmeasured.mean is None
    assert len(unmeasured.records) == 5
    assert partly.mean == pytest.approx(fmean(5e-3 + 1e-5 * expert for expert in range(4)))


def test_layer_without_tokens(checkpoint: Path) -> None:
    manifest = calibrate_folder(checkpoint)
    manifest["expert_tokens"][5] = [0] * 5
    (checkpoint / "minibble.json").write_text(json.dumps(manifest))
    assert [feed.share for feed in quality_of(checkpoint).feeds() if feed.layer == 5] == [0.0] * 5


def test_embedding_and_head_are_outside_the_layers(tmp_path, make_source) -> None:
    quantize_checkpoint(make_source(tmp_path / "source"), tmp_path / "out", quantize_head=True, quantize_embedding=True)
    quality = quality_of(tmp_path / "out")
    assert [record.matrix for record in quality.outside] == ["embed_tokens", "lm_head"]
    assert not {"embed_tokens", "lm_head"} & quality.by_matrix().keys()


def test_nothing_where_nothing_is_told(checkpoint: Path, tmp_path, make_source) -> None:
    """No manifest, one without records, a 16-bit source, and the question what another format would be."""
    assert memory_report(checkpoint, format="bf16").quality is None
    file = checkpoint / "minibble.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantized": {}}))
    assert memory_report(checkpoint).quality is None
    file.unlink()
    assert "quality" not in memory_report(checkpoint).to_json()
    source = make_source(tmp_path / "source")
    (source / "minibble.json").write_text("not ours: nobody reads it beside 16-bit weights")
    assert "quality" not in memory_report(source).to_json()
    assert "quality" not in memory_report("minimax-m1").to_json()


W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the value at `path` in a manifest."""

    def damage(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return damage


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def damage(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("quantized"), "has no 'quantized'"),
        (drop("settings"), "has no 'settings'"),
        (put("quantized", value=[W1]), "'quantized' is"),
        (put("quantized", W1, value=0.01), f"{W1} is 0.01, expected an object"),
        (drop("quantized", W1, "relative_error"), f"{W1} has no 'relative_error'"),
        (put("quantized", W1, "relative_error", value="small"), f"relative_error of {W1} is 'small'"),
        (put("quantized", W1, "relative_error", value=True), "is True"),
        (put("quantized", W1, "relative_error", value=float("nan")), "is nan"),
        (put("quantized", W1, "relative_error", value=10**400), "expected a number"),
        (put("quantized", W1, "output_error", value=-1), "output_error of .* is -1"),
        (put("quantized", W1, "tokens", value=1.5), "tokens of .* is 1.5, expected a whole number"),
        (put("quantized", W1, "shrinkage", value=[]), "shrinkage of"),
        (put("quantized", W1, "fallback", value=3), "fallback of .* expected text"),
        (put("quantized", "model.layers.99.x.weight", value={}), r"model\.layers\.99\.x\.weight is no matrix"),
        (drop("calibration"), "no 'calibration'"),
        (drop("calibration", "text"), "'calibration' has no 'text'"),
        (put("calibration", "samples", value=-1), "samples of 'calibration' is -1"),
        (put("calibration", value="stories"), "'calibration' is 'stories'"),
        (put("expert_tokens", value=[[1] * 5] * 7), "8 layers × 5 experts"),
        (put("expert_tokens", 3, value=[1] * 6), "8 layers × 5 experts"),
        (put("expert_tokens", 3, value=None), "8 layers × 5 experts"),
        (put("expert_tokens", 3, 2, value="many"), "layer 3, expert 2 is 'many'"),
        (put("manifest_version", value=99), "version 99"),
    ],
)
def test_damaged_manifest_is_one_clear_error(tmp_path: Path, damage, message: str) -> None:
    config = ModelConfig.from_file(resolve_source("demo") / "config.json")
    manifest = json.loads(json.dumps(calibrated(config)))
    (tmp_path / "minibble.json").write_text(json.dumps(manifest))
    assert read_quality(tmp_path, config) is not None
    damage(manifest)
    (tmp_path / "minibble.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_quality(tmp_path, config)
    assert "minibble.json" in str(caught.value)


def test_torn_manifest_is_one_clear_error(checkpoint: Path) -> None:
    file = checkpoint / "minibble.json"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"minibble\.json: is no manifest"):
        memory_report(checkpoint)


def test_reads_no_weights() -> None:
    code = "import sys, minibble.runtime.quality; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
