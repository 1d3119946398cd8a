"""Verify finds every kind of damage, names it, and goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.measure import relative_error
from minibble.quantize.nf4 import NF4
from minibble.quantize.verify import MAX_RELATIVE_ERROR, verify_checkpoint
from minibble.quantize.writer import file_sha256

EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def sound(make_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_source(folder / "source")
    quantize_checkpoint(folder / "source", folder / "quantized", device="cpu", shard_size="100kB")
    quantize_checkpoint(folder / "source", folder / "plain", device="cpu", double_quant=False)
    return folder


@pytest.fixture
def quantized(sound, tmp_path):
    return shutil.copytree(sound / "quantized", tmp_path / "quantized")


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit(folder, name, change, manifest=False):
    path = shard_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if not manifest:
        (folder / "minibble.json").unlink()
    return path.name


def only_problem(result, *texts):
    assert len(result.problems) == 1, result
    first_problem(result, *texts)


def first_problem(result, *texts):
    assert not result.ok
    for text in texts:
        assert text in result.problems[0]


def test_sound_checkpoints(sound):
    seen = []
    for folder, against in (("source", None), ("quantized", None), ("plain", "source"), ("quantized", "source")):
        result = verify_checkpoint(sound / folder, against and sound / against, seen.append)
        assert result.ok and result.problems == [] and result.tensors == 60
    assert seen[-1].done_bytes == seen[-1].total_bytes and seen[-1].done_tensors == 60


def test_no_manifest_is_a_note(sound):
    assert "minibble.json" in verify_checkpoint(sound / "source").notes[0]


def test_one_flipped_bit_is_found(quantized):
    path = shard_of(quantized, EXPERT)
    data = bytearray(path.read_bytes())
    data[-100] ^= 4  # the last bytes are the last matrix's codes or JSON
    path.write_bytes(data)
    first_problem(verify_checkpoint(quantized), path.name, "SHA-256")


def test_every_flipped_bit_of_the_data_would_be_found(quantized):
    """Also in tensors whose values all look plausible: embedding, codes, scales."""
    for path in sorted(quantized.glob("*.safetensors"))[:3]:
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        first_problem(verify_checkpoint(quantized), path.name, "SHA-256")
        path.write_bytes(data)


def test_a_truncated_shard(quantized):
    path = shard_of(quantized, EXPERT)
    path.write_bytes(path.read_bytes()[:-1])
    only_problem(verify_checkpoint(quantized), path.name, "truncated")


def test_a_missing_tensor_is_one_problem_of_several(quantized):
    edit(quantized, EXPERT, lambda tensors: tensors.pop(EXPERT))
    result = verify_checkpoint(quantized)
    assert not result.ok and any(f"tensor {EXPERT} is missing" in problem for problem in result.problems)


def test_values_that_are_not_finite(quantized):
    file = edit(quantized, NORM, lambda tensors: tensors[NORM].fill_(float("nan")))
    only_problem(verify_checkpoint(quantized), file, NORM, "NaN")


def test_scales_that_are_not_finite(quantized):
    key = f"{EXPERT}.nested_absmax"
    edit(quantized, EXPERT, lambda tensors: tensors[key].fill_(float("inf")))
    only_problem(verify_checkpoint(quantized), EXPERT, "scales")


def test_a_table_that_is_not_nf4(quantized):
    key = f"{EXPERT}.quant_map"
    edit(quantized, EXPERT, lambda tensors: tensors[key].add_(0.01))
    only_problem(verify_checkpoint(quantized), EXPERT, "quant_map")


def test_codes_of_another_matrix_show_against_the_source(sound, quantized):
    other = EXPERT.replace("experts.1", "experts.2")

    def swap(tensors):
        tensors[EXPERT] = tensors[other].clone()

    edit(quantized, EXPERT, swap)
    assert verify_checkpoint(quantized).ok
    only_problem(verify_checkpoint(quantized, against=sound / "source"), EXPERT, "relative error")


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "minibble.json").read_text())
    (folder / "minibble.json").write_text(json.dumps(manifest | changes))
    return manifest


def test_the_error_must_be_that_of_the_manifest(sound, quantized):
    records = change_manifest(quantized)["quantized"]
    right = records[EXPERT]["relative_error"]
    for factor, ok in ((1.005, True), (1.02, False), (0.98, False)):
        change_manifest(quantized, quantized=records | {EXPERT: {"relative_error": right * factor}})
        result = verify_checkpoint(quantized, against=sound / "source")
        assert result.ok == ok
        if not ok:
            only_problem(result, EXPERT, f"expected {right * factor:.4g} as in minibble.json")


def test_only_calibration_may_cost_more_than_rounding(sound, quantized):
    """Scales too large, hashes and the manifest's figure to match: no rounding, but perhaps a calibration."""
    key = f"{EXPERT}.nested_absmax"
    file = edit(quantized, EXPERT, lambda tensors: tensors[key].mul_(3), manifest=True)
    manifest = change_manifest(quantized)
    checkpoint, source = Checkpoint.open(quantized), Checkpoint.open(sound / "source")
    W = source.read(source.specs[EXPERT])
    error = relative_error(NF4(), W, checkpoint.read(checkpoint.specs[EXPERT]))
    assert error > MAX_RELATIVE_ERROR
    manifest["quantized"][EXPERT] = {"relative_error": error}
    manifest["shards"][file] = {"nbytes": 0, "sha256": file_sha256(quantized / file)}
    change_manifest(quantized, **manifest)
    only_problem(verify_checkpoint(quantized, against=sound / "source"), EXPERT, "expected at most 0.05")
    change_manifest(quantized, calibration={"text": "a.txt"})
    assert verify_checkpoint(quantized, against=sound / "source").ok


@pytest.mark.parametrize("records", [None, [], {EXPERT: 1}, {EXPERT: {"relative_error": "small"}}], ids=str)
def test_errors_that_are_not_recorded_are_bounded(sound, quantized, records):
    change_manifest(quantized, quantized=records)
    assert verify_checkpoint(quantized, against=sound / "source").ok


@pytest.fixture
def int4(sound, make_int4, tmp_path):
    return make_int4(sound / "source", tmp_path / "int4", 64)


def edit_int4(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODULE = EXPERT.removesuffix(".weight")


def test_sound_int4(sound, int4):
    result = verify_checkpoint(int4, against=sound / "source")
    assert result.ok and result.tensors == 60


@pytest.mark.parametrize(
    ("key", "value", "texts"),
    [
        ("scales", float("inf"), ("scales",)),
        ("scales", 1.0, ("relative error",)),
        ("qzeros", 0, ("zero points",)),
        ("g_idx", 1, ("sequential",)),
        ("qweight", 0x77777777, ("relative error",)),
    ],
)
def test_damaged_int4(sound, int4, key, value, texts):
    edit_int4(int4, lambda tensors: tensors[f"{MODULE}.{key}"].fill_(value))
    only_problem(verify_checkpoint(int4, against=sound / "source"), MODULE, *texts)


def test_a_kept_tensor_must_be_identical(sound, quantized):
    edit(quantized, NORM, lambda tensors: tensors[NORM][3:4].mul_(-1))
    only_problem(verify_checkpoint(quantized, against=sound / "source"), NORM, "differs from the source")


def test_against_something_that_is_no_source(sound, make_source, tiny_config, tmp_path):
    result = verify_checkpoint(sound / "quantized", against=sound / "plain")
    assert any("4-bit itself" in problem for problem in result.problems)
    other = make_source(tmp_path / "other", tiny_config(num_local_experts=2))
    assert any("another model" in text for text in verify_checkpoint(sound / "quantized", against=other).problems)
    assert not verify_checkpoint(tmp_path / "nowhere").ok


def test_a_manifest_that_cannot_be_read(quantized):
    for text in ("{", "[]", "{}", '{"manifest_version": 99}', '{"manifest_version": 1, "shards": {"a": {}}}'):
        (quantized / "minibble.json").write_text(text)
        only_problem(verify_checkpoint(quantized), "minibble.json")


def test_minus_zero_is_not_zero(sound, quantized):
    edit(quantized, NORM, lambda tensors: tensors.update({NORM: torch.zeros(64, dtype=torch.bfloat16)}))
    assert not verify_checkpoint(quantized, against=sound / "source").ok
