"""A checkpoint opens if it is exactly the model, in any spelling, and reads back what was written."""

import json
import shutil
from time import perf_counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibble.quantize.builtin import builtin_config
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.config import ModelConfig
from minibble.quantize.dummy import write_dummy
from minibble.quantize.errors import CheckpointError, MinibbleError
from minibble.quantize.int4 import Int4
from minibble.quantize.inventory import inventory, quantized_roles
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.nf4 import NF4
from minibble.quantize.safetensors_file import encode_header
from minibble.quantize.tensors import QuantizedTensor

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.fixture(scope="module")
def source(make_source, tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "a")


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    return quantize_checkpoint(source, tmp_path_factory.mktemp("out") / "q", device="cpu").out


def test_reads_every_tensor_as_it_was_written(source):
    checkpoint = Checkpoint.open(source)
    written = {}
    for path in checkpoint.shards:
        written |= load_file(path)
    assert written.keys() == checkpoint.specs.keys()
    for name, spec in checkpoint.specs.items():
        read = checkpoint.read(spec)
        assert read.dtype == torch.bfloat16 and torch.equal(read, written[name])
    assert checkpoint.total_nbytes == sum(tensor.nbytes for tensor in written.values())
    assert checkpoint.format is None and not checkpoint.quantized


@pytest.mark.parametrize("names", ["hf", "fused"])
@pytest.mark.parametrize("spelling", ["original", "hf"])
def test_aliases_and_fused_experts_read_the_same(source, make_source, tiny_config, tmp_path, names, spelling):
    other = Checkpoint.open(make_source(tmp_path / "b", tiny_config(spelling), shards=3, names=names))
    original = Checkpoint.open(source)
    assert other.inventory == original.inventory and other.total_nbytes == original.total_nbytes
    for spec in original.inventory:
        assert torch.equal(other.read(spec), original.read(spec)), spec.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_dtypes(make_source, tmp_path, dtype):
    checkpoint = Checkpoint.open(make_source(tmp_path / "a", dtype=dtype))
    assert all(checkpoint.read(spec).dtype == dtype for spec in checkpoint.inventory)


def test_a_single_file_needs_no_index(source, tmp_path):
    tensors = {}
    for path in Checkpoint.open(source).shards:
        tensors |= load_file(path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert len(Checkpoint.open(tmp_path).inventory) == len(tensors)


def test_derived_buffers_are_ignored(make_source, tmp_path):
    path = make_source(tmp_path / "a")
    shard = path / "model-00001-of-00002.safetensors"
    extra = {f"model.layers.0.self_attn.{name}": torch.ones(4) for name in ("slope_rate", "query_decay")}
    save_file(load_file(shard) | extra, shard)
    checkpoint = Checkpoint.open(path)
    assert not extra.keys() & checkpoint.specs.keys()


def test_four_bit_reads_as_quantized_tensors(source, quantized):
    original, checkpoint = Checkpoint.open(source), Checkpoint.open(quantized)
    assert checkpoint.format == NF4()
    for spec in checkpoint.inventory:
        read = checkpoint.read(spec)
        if spec.role in quantized_roles():
            assert isinstance(read, QuantizedTensor) and spec.name in checkpoint.quantized
            direct = NF4().encode(original.read(spec))
            assert torch.equal(NF4().decode(read), NF4().decode(direct))
            assert checkpoint.stored_nbytes(spec) == NF4().nbytes(spec.shape)
        else:
            assert torch.equal(read, original.read(spec))


def test_reads_what_bitsandbytes_saves(source, quantized, tmp_path):
    """bitsandbytes does not pad its JSON; every other byte is laid out as ours."""
    functional = pytest.importorskip("bitsandbytes.functional")
    original = Checkpoint.open(source)
    tensors = {}
    for spec in original.inventory:
        weight = original.read(spec)
        if spec.role not in quantized_roles():
            tensors[spec.name] = weight
            continue
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors[spec.name] = codes
        tensors |= {f"{spec.name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    for name in checkpoint.quantized:
        spec = checkpoint.specs[name]
        _, state = functional.quantize_4bit(original.read(spec), quant_type="nf4", compress_statistics=True)
        theirs = functional.dequantize_4bit(tensors[name], state).float()
        assert torch.equal(NF4().decode(checkpoint.read(spec), torch.bfloat16).float(), theirs)


@pytest.fixture(scope="module")
def int4(source, make_int4, tmp_path_factory):
    return make_int4(source, tmp_path_factory.mktemp("int4") / "q", 32)


def changed(folder, out, change):
    """A copy of a checkpoint of one shard, its tensors changed by `change`."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_int4_reads_as_quantized_tensors(source, int4):
    original, checkpoint = Checkpoint.open(source), Checkpoint.open(int4)
    assert checkpoint.format == Int4(32)
    assert checkpoint.quantized == {spec.name for spec in checkpoint.inventory if spec.role in quantized_roles()}
    for spec in checkpoint.inventory:
        read = checkpoint.read(spec)
        if spec.name in checkpoint.quantized:
            assert isinstance(read, QuantizedTensor) and read.levels == "int4"
            assert torch.equal(Int4(32).decode(read), Int4(32).decode(Int4(32).encode(original.read(spec))))
            assert checkpoint.stored_nbytes(spec) == Int4(32).nbytes(spec.shape)
            assert checkpoint.dtype(spec) == torch.int32 and "qweight" in checkpoint.where(spec)
        else:
            assert torch.equal(read, original.read(spec))
    stored = load_file(int4 / "model.safetensors").values()
    assert checkpoint.total_nbytes == sum(tensor.nbytes for tensor in stored)


def test_int4_under_other_tools_names(int4, tmp_path):
    """Experts as `mlp.experts.E.gate_proj.qweight`."""
    matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

    def rename(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            *head, matrix, part = name.replace("block_sparse_moe", "mlp").split(".")
            tensors[".".join([*head, matrices[matrix], part])] = tensors.pop(name)

    theirs, ours = Checkpoint.open(changed(int4, tmp_path / "m", rename)), Checkpoint.open(int4)
    assert theirs.quantized == ours.quantized
    spec = ours.specs[EXPERT]
    assert "up_proj.qweight" in theirs.where(spec)
    assert torch.equal(theirs.read(spec).codes, ours.read(spec).codes)


MODULE = EXPERT.removesuffix(".weight")


def drop(key):
    return lambda tensors: tensors.pop(f"{MODULE}.{key}")


def put(key, tensor):
    return lambda tensors: tensors.update({f"{MODULE}.{key}": tensor})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop("qweight"), f"tensor {MODULE}.qweight is missing"),
        (drop("qzeros"), f"{MODULE}.qzeros is missing, part of the 4-bit matrix {EXPERT}"),
        (drop("g_idx"), f"{MODULE}.g_idx is missing"),
        (put("scales", torch.zeros(2, 64, dtype=torch.bfloat16)), f"{MODULE}.scales is BF16 .*expected float16"),
        (put("qweight", torch.zeros(8, 127, dtype=torch.int32)), rf"{MODULE}.qweight is I32 \[8, 127\]"),
        (put("qweight", torch.zeros(8, 128)), f"{MODULE}.qweight is F32"),
        (put("weight", torch.zeros(128, 64)), f"{EXPERT} is unknown"),
        (put("bias", torch.zeros(128)), f"{MODULE}.bias is unknown"),
    ],
    ids=["qweight", "qzeros", "g_idx", "dtype", "shape", "kind", "weight", "bias"],
)
def test_int4_that_is_not_whole_is_refused(int4, tmp_path, change, text):
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(changed(int4, tmp_path / "m", change))


def test_an_expert_in_16_bit_among_int4_is_refused(int4, tmp_path):
    def leave(tensors):
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{MODULE}.{key}"]
        tensors[EXPERT] = torch.zeros(128, 64)

    with pytest.raises(CheckpointError, match=f"{EXPERT} is F32 in a checkpoint that claims 4 bit"):
        Checkpoint.open(changed(int4, tmp_path / "m", leave))


def test_a_router_in_int4_is_refused(int4, tmp_path):
    router = "model.layers.0.block_sparse_moe.gate"

    def pack(tensors):
        q = Int4(32).encode(torch.cat([tensors.pop(f"{router}.weight").float()] * 2))
        tensors.update(Int4(32).pack(f"{router}.weight", q))

    with pytest.raises(CheckpointError, match=f"{router}.qweight is 4-bit; routers"):
        Checkpoint.open(changed(int4, tmp_path / "m", pack))


def test_groups_that_do_not_fit_the_model_are_refused(int4, tmp_path):
    out = changed(int4, tmp_path / "m", lambda tensors: None)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"self_attn\.qkv_proj\.weight is 192 x 64; int4 needs .*groups of 128"):
        Checkpoint.open(out)


def test_zero_points_of_another_version_are_refused_by_file_and_name(int4, tmp_path):
    zeros = torch.full((2, 16), -0x77777778, dtype=torch.int32)
    checkpoint = Checkpoint.open(changed(int4, tmp_path / "m", put("qzeros", zeros)))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {EXPERT}: .*gptq_v2"):
        checkpoint.read(checkpoint.specs[EXPERT])


def test_dummy_in_int4(tiny_config, tmp_path):
    config = ModelConfig.from_dict(tiny_config())
    nbytes = write_dummy(config, tmp_path / "m", format=Int4(64))
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.format == Int4(64) and checkpoint.total_nbytes == nbytes
    for name in checkpoint.quantized:
        std = float(Int4(64).decode(checkpoint.read(checkpoint.specs[name])).std())
        assert std == pytest.approx(checkpoint.specs[name].shape[-1] ** -0.5, rel=0.21)
    stored = json.loads((tmp_path / "m" / "quantize_config.json").read_text())
    assert stored == checkpoint.config.raw["quantization_config"]


def test_fingerprint_follows_the_content(source, make_source, tmp_path):
    same = make_source(tmp_path / "same")
    other = make_source(tmp_path / "other", seed=1)
    fingerprint = Checkpoint.open(source).fingerprint()
    assert Checkpoint.open(same).fingerprint() == fingerprint != Checkpoint.open(other).fingerprint()


def test_extra_files(source, tmp_path, make_source):
    path = make_source(tmp_path / "a")
    for name in ("modeling_minimax.py", "weights.bin", "vocab.json", "merges.txt", "quantize_config.json", "NOTICE"):
        (path / name).write_text("x")
    (tmp_path / "secret.json").write_text("{}")
    (path / "linked.json").symlink_to(tmp_path / "secret.json")
    names = {file.name for file in Checkpoint.open(path).extra_files()}
    assert names == {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE",
        "vocab.json", "merges.txt", "NOTICE",
    }  # fmt: skip


def test_the_real_model_opens_quickly(tmp_path):
    """8,243 tensors in 414 shards; the files are sparse."""
    config = builtin_config("minimax-text-01")
    (tmp_path / "config.json").write_text(json.dumps(config.raw))
    specs = inventory(config)
    weight_map = {}
    for number in range(414):
        part = specs[number * len(specs) // 414 : (number + 1) * len(specs) // 414]
        header, _ = encode_header({spec.name: (torch.bfloat16, spec.shape) for spec in part})
        name = f"model-{number:05d}-of-00413.safetensors"
        with open(tmp_path / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * sum(spec.numel for spec in part))
        weight_map |= {spec.name: name for spec in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    started = perf_counter()
    checkpoint = Checkpoint.open(tmp_path)
    assert perf_counter() - started < 5  # 0.3 s alone; the margin is for busy machines
    assert checkpoint.total_nbytes == 2 * 456_089_655_296


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "4 bit"),
    ],
)
def test_other_quantizations_are_refused_with_a_reason(make_source, tiny_config, tmp_path, quantization, text):
    path = make_source(tmp_path / "a", tiny_config(quantization_config=quantization))
    with pytest.raises(MinibbleError, match=text):
        Checkpoint.open(path)


def test_problems_are_listed_when_not_strict(make_source, tmp_path, tiny_config):
    path = make_source(tmp_path / "a")
    config = ModelConfig.from_dict(tiny_config(num_local_experts=5))
    (path / "config.json").write_text(json.dumps(config.raw))
    checkpoint = Checkpoint.open(path, strict=False)
    assert len(checkpoint.problems) == 3 * (3 + 1)  # three matrices and the router's shape, in three layers
    with pytest.raises(CheckpointError, match="and 9 more problems"):
        Checkpoint.open(path)
