"""Checkpoints with something missing, left over, doubled, wrong or hostile: each is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError
from minibble.quantize.job import quantize_checkpoint

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def sound(make_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_source(folder / "source")
    quantize_checkpoint(folder / "source", folder / "quantized", device="cpu")
    return folder


@pytest.fixture
def source(sound, tmp_path):
    return shutil.copytree(sound / "source", tmp_path / "source")


@pytest.fixture
def quantized(sound, tmp_path):
    return shutil.copytree(sound / "quantized", tmp_path / "quantized")


def refused(folder, *texts):
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    for text in texts:
        assert text in str(error.value), str(error.value)


def edit(folder, file, change, index=True):
    """Apply `change` to the tensors of one shard; the index follows unless told not to."""
    tensors = load_file(folder / file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, folder / file)
    if index:
        edit_index(folder, lambda weight_map: _follow(weight_map, before, tensors, file))


def _follow(weight_map, before, tensors, file):
    for name in before - tensors.keys():
        del weight_map[name]
    for name in tensors.keys() - before:
        weight_map[name] = file


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_tensor(source):
    edit(source, FIRST, lambda tensors: tensors.pop(EXPERT))
    refused(source, f"tensor {EXPERT} is missing", "Download")


def test_an_unknown_tensor(source):
    edit(source, FIRST, lambda tensors: tensors.update({"model.layers.0.shared.weight": torch.ones(1)}))
    refused(source, f"{FIRST}: model.layers.0.shared.weight is unknown")


def test_a_tensor_beyond_the_last_layer(source):
    edit(source, FIRST, lambda tensors: tensors.update({"model.layers.3.input_layernorm.weight": torch.ones(64)}))
    refused(source, "model.layers.3.input_layernorm.weight is unknown")


def test_the_same_tensor_in_two_shards(source):
    edit(source, SECOND, lambda tensors: tensors.update({QKV: torch.ones(192, 64)}), index=False)
    refused(source, f"{QKV} is there twice", FIRST, SECOND)


def test_two_spellings_of_one_tensor(source):
    alias = "model.layers.0.mlp.experts.1.down_proj.weight"
    edit(source, SECOND, lambda tensors: tensors.update({alias: torch.ones(64, 128)}))
    refused(source, f"{EXPERT} is there twice", alias)


def test_fused_and_single_experts_together(source):
    fused = "model.layers.0.mlp.experts.down_proj"
    edit(source, SECOND, lambda tensors: tensors.update({fused: torch.ones(4, 64, 128)}))
    refused(source, "is there twice", fused)


def test_fused_experts_of_a_wrong_shape(make_source, tmp_path):
    path = make_source(tmp_path / "fused", names="fused", shards=1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    edit(path, "model-00001-of-00001.safetensors", lambda t: t.update({name: torch.ones(4, 64, 256)}))
    refused(path, f"{name} is F32 [4, 64, 256], expected [4, 256, 64]")


def test_a_wrong_shape(source):
    edit(source, FIRST, lambda tensors: tensors.update({QKV: torch.ones(64, 192)}))
    refused(source, f"{FIRST}: {QKV} is F32 [64, 192], expected [192, 64]")


def test_a_wrong_dtype(source):
    edit(source, FIRST, lambda tensors: tensors.update({QKV: torch.ones(192, 64, dtype=torch.int8)}))
    refused(source, f"{QKV} is I8", "BF16")


def test_many_faults_are_counted(source):
    def halve(tensors):
        for name in list(tensors)[:10]:
            tensors[name] = tensors[name][:1].clone()

    edit(source, FIRST, halve)
    refused(source, "more problems")


def test_the_index_lists_what_is_not_there(source):
    edit(source, FIRST, lambda tensors: tensors.pop(QKV), index=False)
    refused(source, f"has {QKV} in {FIRST}, where it is missing")


def test_the_index_does_not_list_what_is_there(source):
    edit_index(source, lambda weight_map: weight_map.pop(QKV))
    refused(source, f"{FIRST}: {QKV} is not in model.safetensors.index.json")


def test_a_missing_shard_and_a_stray_one(source):
    shutil.copy(source / FIRST, source / "model-00003-of-00003.safetensors")
    refused(source, "model-00003-of-00003.safetensors is not in")
    (source / "model-00003-of-00003.safetensors").unlink()
    (source / SECOND).unlink()
    refused(source, f"shard {SECOND} is missing")


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors", "a\\b.safetensors"]
)
def test_paths_out_of_the_folder(source, tmp_path, name):
    shutil.copy(source / FIRST, tmp_path / "stolen.safetensors")
    edit_index(source, lambda weight_map: weight_map.update({QKV: name}))
    refused(source, "expected a file of the folder itself")


def test_a_shard_that_is_no_safetensors(source):
    edit_index(source, lambda weight_map: weight_map.update({QKV: "pytorch_model.bin"}))
    refused(source, "'pytorch_model.bin'", "expected a .safetensors file")


def test_a_link_out_of_the_folder(source, tmp_path):
    (source / FIRST).rename(tmp_path / "outside.safetensors")
    (source / FIRST).symlink_to(tmp_path / "outside.safetensors")
    refused(source, FIRST, "outside the checkpoint's folder")


def test_the_hugging_face_cache_is_the_one_place_of_links(source, tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(Checkpoint.open(snapshot).extra_files()) == 5
    (repository / "blobs" / FIRST).rename(repository / FIRST)
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(f"../../{FIRST}")
    refused(snapshot, "outside the checkpoint's folder")


def test_pickles_are_never_read(source):
    for path in (*source.glob("*.safetensors"), source / "model.safetensors.index.json"):
        path.unlink()
    (source / "pytorch_model-00001.bin").write_bytes(b"\x80\x04.")
    refused(source, "pickles can run code", "convert")


def test_no_folder_and_an_empty_one(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "neither")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index(source, text):
    (source / "model.safetensors.index.json").write_text(text)
    refused(source, "model.safetensors.index.json")


def test_an_expert_left_in_16_bit(quantized, source):
    file = next(quantized.glob("*.safetensors")).name
    weight = load_file(source / FIRST)[EXPERT]

    def restore(tensors):
        for name in [name for name in tensors if name.startswith(EXPERT)]:
            del tensors[name]
        tensors[EXPERT] = weight

    edit(quantized, file, restore)
    refused(quantized, f"{EXPERT} is BF16 in a checkpoint that claims 4 bit", "minibble")


@pytest.mark.parametrize(
    "part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"]
)
def test_a_missing_part_of_a_4bit_matrix(quantized, part):
    file = next(quantized.glob("*.safetensors")).name
    edit(quantized, file, lambda tensors: tensors.pop(f"{EXPERT}.{part}"))
    refused(quantized, f"tensor {EXPERT}.{part} is missing")


def test_a_wrong_part_of_a_4bit_matrix(quantized):
    file = next(quantized.glob("*.safetensors")).name
    edit(quantized, file, lambda tensors: tensors.update({f"{EXPERT}.absmax": torch.ones(128)}))
    refused(quantized, f"{EXPERT}.absmax is F32 [128], expected uint8 [128]")


def test_a_4bit_router_is_refused(quantized):
    file = next(quantized.glob("*.safetensors")).name
    edit(quantized, file, lambda tensors: tensors.update({ROUTER: torch.ones(128, 1, dtype=torch.uint8)}))
    refused(quantized, f"{ROUTER} is 4-bit; routers and norms must stay")


def test_4bit_codes_in_a_checkpoint_that_claims_none(quantized, source):
    shutil.copy(source / "config.json", quantized / "config.json")
    refused(quantized, "is U8", "expected")


def test_a_quant_state_of_another_matrix(quantized):
    """The headers cannot show it: the read does, naming file and tensor."""
    file = next(quantized.glob("*.safetensors")).name
    key, other = f"{EXPERT}.quant_state.bitsandbytes__nf4", f"{QKV}.quant_state.bitsandbytes__nf4"
    edit(quantized, file, lambda tensors: tensors.update({key: tensors[other].clone()}))
    checkpoint = Checkpoint.open(quantized)
    with pytest.raises(CheckpointError, match=f"{file}: {EXPERT}: quant_state has shape"):
        checkpoint.read(checkpoint.specs[EXPERT])


def test_a_weight_that_is_not_finite(source, tmp_path):
    for value in (float("nan"), float("inf")):
        edit(source, FIRST, lambda tensors, value=value: tensors[QKV].view(-1)[77].fill_(value))
        with pytest.raises(CheckpointError, match=f"{FIRST}: {QKV} has NaN or infinite"):
            quantize_checkpoint(source, tmp_path / f"out{value}", device="cpu")
