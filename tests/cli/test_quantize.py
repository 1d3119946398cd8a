"""`minibble quantize` and `minibble verify`."""

import shutil

import pytest


def test_dry_run_says_what_would_be_written(cli, cli_json, source, tmp_path) -> None:
    out = tmp_path / "out"
    plan = cli_json("quantize", source, out, "--dry-run", "--shard-size", "100kB")
    assert plan["dry_run"]
    assert len(plan["shards"]) > 1
    assert all(shard["bytes"] <= 100_000 for shard in plan["shards"])
    assert plan["quantized_tensors"] == 2 * 3 + 4 + 3 * 4 * 3
    assert plan["bits_per_weight"] == 8 * plan["output_bytes"] / plan["parameters"]
    result = cli("quantize", source, out, "--dry-run")
    assert result.exit_code == 0
    assert f"{plan['quantized_tensors']} matrices 4-bit, {plan['kept_tensors']} tensors kept" in result.stdout
    assert "model-00001-of-00001.safetensors" in result.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "format"),
    [([], "nf4-dq"), (["--no-double-quant"], "nf4"), (["--quantize-head", "--quantize-embedding"], "nf4-dq-all")],
)
def test_options_reach_the_format(cli_json, source, tmp_path, options, format: str) -> None:
    plan = cli_json("quantize", source, tmp_path / "out", "--dry-run", *options)
    assert plan["output_bytes"] == cli_json("report", source, "--format", format)["total_bytes"]


def test_quantize_then_verify(cli, cli_json, source, tmp_path) -> None:
    out = tmp_path / "out"
    done = cli_json("quantize", source, out, "--shard-size", "200kB")
    assert done["out"] == str(out)
    assert done["relative_error"] < 0.01
    assert done["output_bytes"] == cli_json("report", out)["total_bytes"]
    assert {shard["file"] for shard in done["shards"]} == {path.name for path in out.glob("*.safetensors")}
    assert cli_json("verify", out, "--against", source) == {
        "ok": True, "tensors": done["quantized_tensors"] + done["kept_tensors"], "problems": [], "notes": []
    }  # fmt: skip
    assert "no problems" in cli("verify", out).stdout


def test_quantize_for_a_person(cli, source, tmp_path) -> None:
    result = cli("quantize", source, tmp_path / "out")
    assert result.exit_code == 0
    assert "matrices 4-bit" in result.stdout
    assert "bits per weight" in result.stdout


def test_existing_output_is_not_overwritten(cli, source, quantized) -> None:
    before = {path.name: path.read_bytes() for path in quantized.iterdir() if path.is_file()}
    result = cli("quantize", source, quantized)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert before == {path.name: path.read_bytes() for path in quantized.iterdir() if path.is_file()}


def test_4_bit_source_is_refused(cli, quantized, tmp_path) -> None:
    result = cli("quantize", quantized, tmp_path / "out")
    assert result.exit_code == 1
    assert "already 4-bit" in result.stderr


def test_verify_ends_with_1_on_damage(cli, quantized, tmp_path) -> None:
    import json

    damaged = shutil.copytree(quantized, tmp_path / "damaged")
    shard = next(damaged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100_000] ^= 1
    shard.write_bytes(data)
    result = cli("verify", damaged, "--json")
    assert result.exit_code == 1
    outcome = json.loads(result.stdout)
    assert not outcome["ok"]
    assert len(outcome["problems"]) == 1
    text = cli("verify", damaged)
    assert text.exit_code == 1
    assert "1 problem" in text.stdout
