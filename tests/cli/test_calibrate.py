"""`minibble quantize` with calibration: its options, what it says, and its JSON."""

import json
from pathlib import Path

import pytest

FEW = ("--samples", "2", "--seq-len", "32", "--sweeps", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("All that is gold does not glitter. " * 40, encoding="utf-8")
    return path


def test_dry_run_tells_text_and_memory_and_writes_nothing(cli, cli_json, source, text, tmp_path) -> None:
    arguments = ("quantize", source, tmp_path / "out", "--calibration", text, *FEW, "--dry-run")
    plan = cli_json(*arguments)
    assert plan["calibration"]["tokens"] == 64
    assert plan["memory"]["tokens"] == 64 and plan["memory"]["gpu_bytes"] == 0 and plan["memory"]["host_bytes"] > 0
    shown = cli(*arguments).stdout
    assert "words.txt, 2 x 32 tokens, seed 0" in shown and "of host memory" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "format"),
    [((), "nf4-dq"), (("--no-double-quant",), "nf4"), (("--method", "gptq", "--group-size", "64"), "int4-g64")],
)
def test_calibrated_output_is_verified_and_reported(cli, cli_json, source, text, tmp_path, options, format) -> None:
    out = tmp_path / "out"
    result = cli("quantize", source, out, "--calibration", text, *FEW, *options)
    assert result.exit_code == 0, result.stderr
    assert "mean output error" in result.stdout
    for layer in (1, 2, 3):
        assert f"layer {layer} of 3: output error" in result.stderr
    assert cli_json("verify", out, "--against", source)["ok"]
    report = cli_json("report", out)
    assert report["format"] == format
    assert report["quality"]["calibration"]["text"] == "words.txt"
    assert [sum(tokens) for tokens in report["quality"]["expert_tokens"]] == [2 * 64] * 3


def test_json_of_a_calibrated_job(cli_json, source, text, tmp_path) -> None:
    done = cli_json("quantize", source, tmp_path / "out", "--calibration", text, *FEW, "--seed", "1")
    manifest = json.loads((tmp_path / "out" / "minibble.json").read_text())
    assert done["calibration"] == manifest["calibration"] and manifest["calibration"]["seed"] == 1
    assert done["mean_output_error"] == manifest["totals"]["mean_output_error"] > 0
    assert done["fallbacks"] == manifest["totals"]["fallbacks"] == 0
    assert manifest["settings"]["sweeps"] == 1 and manifest["settings"]["act_order"] is True


def test_standard_input_is_a_text(cli, source, tmp_path) -> None:
    result = cli(
        "quantize", source, tmp_path / "out", "--calibration", "-", *FEW, input="Not all those who wander. " * 9
    )
    assert result.exit_code == 0, result.stderr
    assert "calibration: -, 2 x 32 tokens" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "4"), "samples: of no use without calibration"),
        (("--group-size", "32"), "NF4 has blocks of 64"),
        (("--method", "gptq", "--group-size", "48"), "group size 48 is not one of 32, 64, 128"),
        (("--calibration", "nowhere.txt"), "nowhere.txt: there is no such file"),
        (("--calibration", "demo", "--damp", "2"), "damp 2 is not between 0 and 1"),
        (("--calibration", "demo", "--sweeps", "-1"), "-1 sweeps"),
        (("--calibration", "demo", "--samples", "9999999"), "--samples"),
    ],
)
def test_what_is_refused_is_one_line(cli, source, tmp_path, options, message) -> None:
    result = cli("quantize", source, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_strict_names_layer_and_expert(cli, source, tmp_path) -> None:
    few = ("--samples", "1", "--seq-len", "4", "--sweeps", "0", "--device", "cpu")
    result = cli("quantize", source, tmp_path / "out", "--calibration", "demo", *few, "--strict")
    assert result.exit_code == 1
    assert "layer 0" in result.stderr and "--strict" in result.stderr
    lax = cli("quantize", source, tmp_path / "lax", "--calibration", "demo", *few)
    assert lax.exit_code == 0 and "rounded to nearest" in lax.stdout
