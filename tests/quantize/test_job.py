"""Quantizing a whole checkpoint: what is written, what is kept, and what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minibble.quantize.builtin import builtin_config
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.config import ModelConfig
from minibble.quantize.dummy import write_dummy
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.inventory import inventory, quantized_roles
from minibble.quantize.job import NearestJob, quantize_checkpoint
from minibble.quantize.measure import all_finite, relative_error
from minibble.quantize.nf4 import NF4
from minibble.quantize.prefetch import ahead
from minibble.quantize.settings import make_settings
from minibble.quantize.shards import plan_shards
from minibble.quantize.verify import verify_checkpoint


@pytest.fixture(scope="module")
def source(make_source, tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "a")


@pytest.fixture(scope="module")
def result(source, tmp_path_factory):
    return quantize_checkpoint(source, tmp_path_factory.mktemp("out") / "q", device="cpu", shard_size="40kB")


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_is_there(source, result):
    names = {path.name for path in result.out.iterdir()}
    shards = {name for name, _ in result.plan.shards}
    assert len(shards) > 3
    assert names == shards | {
        "config.json", "minibble.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    for name, nbytes in result.plan.shards:
        assert (result.out / name).stat().st_size == nbytes <= 40_000
    raw = json.loads((result.out / "config.json").read_text())
    assert raw.pop("quantization_config")["bnb_4bit_use_double_quant"] is True
    assert raw == json.loads((source / "config.json").read_text())


def test_the_plan_is_what_is_written(source, result):
    plan = NearestJob(source, result.out, make_settings(shard_size="40kB"), "cpu").plan
    checkpoint = Checkpoint.open(result.out)
    assert plan == result.plan
    assert plan.output_bytes == checkpoint.total_nbytes
    assert plan.source_bytes == Checkpoint.open(source).total_nbytes == 2 * plan.parameters
    assert plan.bits_per_weight == 8 * plan.output_bytes / plan.parameters
    assert plan.quantized_tensors == len(checkpoint.quantized)
    assert plan.kept_tensors == len(checkpoint.inventory) - len(checkpoint.quantized)


def test_the_manifest_tells_what_was_done(source, result):
    manifest = json.loads(result.manifest.read_text())
    checkpoint, original = Checkpoint.open(result.out), Checkpoint.open(source)
    assert manifest["source"]["fingerprint"] == original.fingerprint()
    assert manifest["quantized"].keys() == checkpoint.quantized
    assert manifest["kept"].keys() == checkpoint.specs.keys() - checkpoint.quantized
    for name, record in manifest["quantized"].items():
        W = original.read(checkpoint.specs[name]).double()
        Q = NF4().decode(checkpoint.read(checkpoint.specs[name])).double()
        assert record["relative_error"] == pytest.approx(float((W - Q).square().sum() / W.square().sum()), rel=1e-4)
    errors = [record["relative_error"] for record in manifest["quantized"].values()]
    assert result.relative_error == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert min(errors) > 0.007 and max(errors) < 0.010
    assert manifest["totals"]["nbytes"] == result.plan.output_bytes


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_decodes_every_matrix_to_our_bits(source, tmp_path, double_quant):
    functional = pytest.importorskip("bitsandbytes.functional")
    result = quantize_checkpoint(source, tmp_path / "q", device="cpu", double_quant=double_quant)
    checkpoint, tensors = Checkpoint.open(result.out), {}
    for path in checkpoint.shards:
        tensors |= load_file(path)
    for name in checkpoint.quantized:
        parts = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        theirs = functional.dequantize_4bit(tensors[name], state)
        ours = NF4(double_quant=double_quant).decode(checkpoint.read(checkpoint.specs[name]), torch.bfloat16)
        assert theirs.dtype == torch.bfloat16 and torch.equal(theirs, ours), name


def test_two_runs_are_byte_identical(source, result, tmp_path):
    again = quantize_checkpoint(source, tmp_path / "q", device="cpu", shard_size=40_000)
    assert snapshot(again.out) == snapshot(result.out)


def test_fused_source_gives_the_same_tensors(make_source, result, tmp_path):
    other = quantize_checkpoint(
        make_source(tmp_path / "a", names="fused", shards=1), tmp_path / "q", device="cpu", shard_size="40kB"
    )
    for name, _ in result.plan.shards:
        assert (other.out / name).read_bytes() == (result.out / name).read_bytes()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_choices(source, tmp_path, head, embedding, double_quant):
    result = quantize_checkpoint(
        source, tmp_path / "q", quantize_head=head, quantize_embedding=embedding, double_quant=double_quant,
        device="cpu",
    )  # fmt: skip
    checkpoint = Checkpoint.open(result.out)
    roles = quantized_roles(head, embedding)
    assert checkpoint.quantized == {spec.name for spec in checkpoint.inventory if spec.role in roles}
    assert checkpoint.format == NF4(double_quant=double_quant)
    skipped = json.loads((result.out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert ("lm_head" in skipped) is not head
    assert verify_checkpoint(result.out, against=source).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kept_tensors_keep_their_dtype(make_source, tmp_path, dtype):
    source = make_source(tmp_path / "a", dtype=dtype)
    result = quantize_checkpoint(source, tmp_path / "q", device="cpu")
    manifest = json.loads(result.manifest.read_text())
    assert set(manifest["kept"].values()) == {str(dtype).removeprefix("torch.")}
    assert verify_checkpoint(result.out, against=source).problems == []


def test_progress_counts_source_bytes(source, tmp_path):
    seen = []
    result = quantize_checkpoint(source, tmp_path / "q", device="cpu", progress=seen.append)
    assert [step.done_bytes for step in seen] == sorted(step.done_bytes for step in seen)
    assert seen[-1].done_bytes == seen[-1].total_bytes == result.plan.source_bytes
    assert [step.done_tensors for step in seen] == list(range(1, seen[-1].total_tensors + 1))
    assert seen[0].current == "model.embed_tokens.weight"


def test_an_interrupted_job_resumes_identical(source, result, tmp_path):
    def interrupt(step):
        if step.done_tensors == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "q", device="cpu", shard_size="40kB", progress=interrupt)
    seen = []
    resumed = quantize_checkpoint(
        source, tmp_path / "q", device="cpu", shard_size="40kB", resume=True, progress=seen.append
    )
    assert 1 < seen[0].done_tensors <= 20 and seen[-1].done_bytes == result.plan.source_bytes
    assert snapshot(resumed.out) == snapshot(result.out)


def test_resuming_from_another_source_is_refused(source, make_source, tmp_path):
    quantize_checkpoint(source, tmp_path / "q", device="cpu")
    other = make_source(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"source\.fingerprint was"):
        quantize_checkpoint(other, tmp_path / "q", device="cpu", resume=True)


def test_what_is_refused(source, result, tmp_path):
    with pytest.raises(CheckpointError, match=r"already 4-bit \(nf4-dq\)"):
        quantize_checkpoint(result.out, tmp_path / "q")
    for out in (source, source / "inside", source / "x" / ".." / "y"):
        with pytest.raises(CheckpointError, match="inside the source"):
            quantize_checkpoint(source, out)
        assert "model.safetensors.index.json" in snapshot(source) and not (source / "inside").exists()
    with pytest.raises(ConfigError, match="'int3'"):
        make_settings("int3")
    with pytest.raises(ConfigError, match="shard size"):
        quantize_checkpoint(source, tmp_path / "q", shard_size="0GB")
    with pytest.raises(CheckpointError, match="no such folder"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "q")


def test_code_and_auto_map_are_left_behind(make_source, tiny_config, tmp_path):
    config = tiny_config(auto_map={"AutoModelForCausalLM": "modeling_minimax.MiniMax"})
    source = make_source(tmp_path / "a", config)
    (source / "modeling_minimax.py").write_text("raise SystemExit")
    result = quantize_checkpoint(source, tmp_path / "q", device="cpu")
    assert "auto_map" not in json.loads((result.out / "config.json").read_text())
    assert not list(result.out.glob("*.py"))
    assert any("auto_map" in note for note in json.loads(result.manifest.read_text())["notes"])


def test_the_released_model_is_planned_to_the_byte():
    """239.0 GB, as derived by hand; shards of at most 5 GB."""
    specs = inventory(builtin_config("minimax-text-01"))
    items = [
        (
            spec.name,
            NF4().stored(spec.name, spec.shape)
            if spec.role in quantized_roles()
            else {spec.name: (torch.bfloat16, spec.shape)},
        )
        for spec in specs
    ]
    shards = plan_shards(items, 5 * 10**9)
    total = sum(shard.tensor_nbytes for shard in shards)
    assert 238.9e9 < total < 239.1e9
    assert max(shard.nbytes for shard in shards) <= 5 * 10**9 and len(shards) == 48


@given(st.integers(1, 70), st.integers(1, 700), st.booleans())
def test_relative_error_of_any_shape(rows, columns, double_quant):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    format = NF4(double_quant=double_quant)
    q = format.encode(W)
    expected = float((W.double() - format.decode(q).double()).square().sum() / W.double().square().sum())
    assert relative_error(format, W, q) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_relative_error_over_several_chunks(monkeypatch):
    monkeypatch.setattr("minibble.quantize.nf4_math._CHUNK_CPU", 1 << 14)
    test_relative_error_of_any_shape.hypothesis.inner_test(70, 701, True)


def test_relative_error_of_zeros_is_zero():
    W = torch.zeros(4, 64)
    assert relative_error(NF4(), W, NF4().encode(W)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_bad_value_is_found(dtype, value):
    tensor = torch.randn(33, 65).to(dtype)
    assert all_finite(tensor) and all_finite(tensor[:0])
    for place in (0, 7, 1000, -1):
        bad = tensor.clone()
        bad.view(-1)[place] = value
        assert not all_finite(bad)


def test_reading_ahead_keeps_order_and_errors():
    assert list(ahead(lambda item: item * 2, range(5))) == [(n, 2 * n) for n in range(5)]
    assert list(ahead(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 // item, [1, 0, 2]))


@pytest.mark.parametrize("format", [None, NF4(), NF4(double_quant=False)])
def test_dummy_checkpoints_are_sound(tiny_config, tmp_path, format):
    config = ModelConfig.from_dict(tiny_config())
    nbytes = write_dummy(config, tmp_path / "d", format=format, shard_size="100kB")
    checkpoint = Checkpoint.open(tmp_path / "d")
    assert checkpoint.format == format and checkpoint.total_nbytes == nbytes
    assert verify_checkpoint(tmp_path / "d").ok
    spec = checkpoint.specs["model.layers.0.self_attn.qkv_proj.weight"]
    weight = checkpoint.read(spec)
    weight = weight if format is None else format.decode(weight)
    assert float(weight.float().std()) == pytest.approx(64**-0.5, rel=0.1)


@pytest.mark.gpu
def test_a_gpu_writes_the_same_bytes(source, tmp_path, cuda_device):
    on_gpu = quantize_checkpoint(source, tmp_path / "gpu", device=cuda_device)
    on_cpu = quantize_checkpoint(source, tmp_path / "cpu", device="cpu")
    a, b = Checkpoint.open(on_gpu.out), Checkpoint.open(on_cpu.out)
    for name in a.quantized:
        left, right = a.read(a.specs[name]), b.read(b.specs[name])
        assert (left.codes != right.codes).float().mean() < 1e-4  # weights on the border of two levels
