"""Calibrated quantization of whole checkpoints: what is written, what a stop leaves, what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import calibration_source as known
from golden.calibration_source import EXPERTS, LAYERS, ONCE, SAMPLES, SEQ_LEN, TOKENS, edit
from torch import Tensor

import minibble
from minibble.calibrate import job, plan, solver
from minibble.calibrate.job import CalibratedJob, open_job, quantize
from minibble.calibrate.layer import MIN_TOKENS
from minibble.calibrate.plan import Budget
from minibble.calibrate.stream import LayerReport
from minibble.calibrate.text import ids_sha256, read_calibration
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import BudgetError, CalibrationError, CheckpointError, ConfigError, MinibbleError
from minibble.quantize.folder import JOURNAL
from minibble.quantize.inventory import quantized_roles
from minibble.quantize.job import NearestJob, QuantizeResult
from minibble.quantize.journal import read_journal
from minibble.quantize.verify import verify_checkpoint
from minibble.quantize.writer import file_sha256

Config = Callable[..., dict[str, Any]]
Make = Callable[..., Path]
SETTINGS: dict[str, Any] = {"samples": SAMPLES, "seq_len": SEQ_LEN, "damp": 0.01, "sweeps": 1, "device": "cpu"}
SMALL = "9kB"  # several shards a layer
EXPERT = f"model.layers.1.block_sparse_moe.experts.{ONCE + 2}.w1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_source: Make, tiny_config: Config) -> Path:
    """Holds `source` and `text.txt`."""
    folder = tmp_path_factory.mktemp("calibrated")
    known.write(folder, make_source, tiny_config)
    return folder


def calibrate(folder: Path, out: Path, **settings: Any) -> QuantizeResult:
    return quantize(folder / "source", out, **(SETTINGS | {"calibration": folder / "text.txt"} | settings))


@pytest.fixture(scope="module")
def reports() -> list[LayerReport]:
    return []


@pytest.fixture(scope="module")
def whole(folder: Path, reports: list[LayerReport]) -> QuantizeResult:
    """NF4 in small shards, in one go."""
    return calibrate(folder, folder / "whole", shard_size=SMALL, on_layer=reports.append)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of source and text to spoil."""
    shutil.copytree(folder / "source", tmp_path / "source")
    shutil.copy(folder / "text.txt", tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest_of(result: QuantizeResult) -> dict[str, Any]:
    return json.loads(result.manifest.read_text())


def test_the_output_is_a_checkpoint_like_any_other(folder: Path, whole: QuantizeResult) -> None:
    found = verify_checkpoint(whole.out, against=folder / "source")
    assert found.ok and not found.notes, found
    checkpoint = Checkpoint.open(whole.out)
    assert checkpoint.format is not None and checkpoint.format.name == "nf4-dq"
    assert checkpoint.quantized == {spec.name for spec in checkpoint.inventory if spec.role in quantized_roles()}
    logits = minibble.load(whole.out, device="cpu", dtype=torch.float32)(torch.arange(4, 12)[None]).logits
    assert bool(torch.isfinite(logits).all())
    layers = [{checkpoint.specs[name].layer for name in shard.names} for shard in whole.plan.layout]
    assert all(len(of_shard) == 1 for of_shard in layers), "a shard holds tensors of two layers"
    assert len([of_shard for of_shard in layers if of_shard == {0}]) > 3


def test_the_manifest_tells_what_was_done(folder: Path, whole: QuantizeResult) -> None:
    manifest = manifest_of(whole)
    text = read_calibration(folder / "text.txt", folder / "source", samples=SAMPLES, seq_len=SEQ_LEN)
    assert manifest["calibration"] == {
        "text": "text.txt", "sha256": ids_sha256(text.ids), "samples": SAMPLES, "seq_len": SEQ_LEN, "tokens": TOKENS,
        "seed": 0,
    }  # fmt: skip
    wanted = {"method": "nf4", "block_size": 64, "damp": 0.01, "act_order": True, "sweeps": 1}
    assert manifest["settings"].items() >= wanted.items()
    assert manifest["quantized"].keys() == Checkpoint.open(whole.out).quantized
    assert whole.totals == manifest["totals"] and whole.totals["fallbacks"] == 2 * 3 * LAYERS
    assert str(folder) not in whole.manifest.read_text()


def test_each_layer_is_reported(whole: QuantizeResult, reports: list[LayerReport]) -> None:
    manifest = manifest_of(whole)
    assert [(report.index, report.layers) for report in reports] == [(layer, LAYERS) for layer in range(LAYERS)]
    for layer, report in enumerate(reports):
        own = [record for name, record in manifest["quantized"].items() if name.startswith(f"model.layers.{layer}.")]
        errors = [record["output_error"] for record in own if "output_error" in record]
        assert report.expert_tokens == manifest["expert_tokens"][layer] and report.fallbacks == 6
        assert report.output_error == pytest.approx(sum(errors) / len(errors)) and report.elapsed_s > 0


@pytest.mark.parametrize("group_size", [32, 64])
def test_gptq(folder: Path, tmp_path: Path, group_size: int) -> None:
    result = calibrate(folder, tmp_path / "q", method="gptq", group_size=group_size)
    assert verify_checkpoint(result.out, against=folder / "source").ok
    checkpoint, manifest = Checkpoint.open(result.out), manifest_of(result)
    assert checkpoint.format is not None and checkpoint.format.name == f"int4-g{group_size}"
    assert manifest["settings"]["method"] == "gptq" and manifest["settings"]["block_size"] == group_size
    assert (result.out / "quantize_config.json").exists()
    assert bool(torch.isfinite(minibble.load(result.out, device="cpu")(torch.arange(4, 12)[None]).logits).all())
    assert 0 < manifest["totals"]["mean_output_error"] < 0.02


def test_choices(folder: Path, tmp_path: Path) -> None:
    """Head and embedding in 4 bits are rounded to nearest; absmax without second level; other orders and damps."""
    result = calibrate(
        folder, tmp_path / "q", quantize_head=True, quantize_embedding=True, double_quant=False, act_order=False,
        damp=0.1, sweeps=0,
    )  # fmt: skip
    assert verify_checkpoint(result.out, against=folder / "source").ok
    records = manifest_of(result)["quantized"]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert records[name].keys() == {"relative_error"}
    assert {record["damp"] for record in records.values() if "damp" in record} == {0.1}


class Stop(Exception):
    """What a caller may raise in between."""


def stop_after_layer(layer: int) -> dict[str, Any]:
    def on_layer(report: LayerReport) -> None:
        if report.index == layer:
            raise Stop

    return {"on_layer": on_layer}


def stop_at(name: str) -> dict[str, Any]:
    def progress(found: Any) -> None:
        if found.current == name:
            raise Stop

    return {"progress": progress}


@pytest.mark.parametrize(
    "stop", [stop_after_layer(0), stop_after_layer(1), stop_at(EXPERT), stop_at("lm_head.weight")],
    ids=["after layer 0", "after layer 1", "inside layer 1", "at the end"],
)  # fmt: skip
def test_a_stopped_job_goes_on(folder: Path, whole: QuantizeResult, tmp_path: Path, stop: dict[str, Any]) -> None:
    """Whole shards are kept, nothing else; the output ends byte-identical, and finished layers are not solved again."""
    out = tmp_path / "q"
    with pytest.raises(Stop):
        calibrate(folder, out, shard_size=SMALL, **stop)
    kept = {path.name for path in out.glob("*.safetensors")}
    assert {path.name for path in out.iterdir()} == kept | {JOURNAL} and 0 < len(kept) < len(whole.plan.shards)
    with pytest.raises(CheckpointError):
        Checkpoint.open(out)
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    layers: list[LayerReport] = []
    calibrate(folder, out, shard_size=SMALL, resume=True, on_layer=layers.append)
    assert snapshot(out) == snapshot(whole.out)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before
    specs = Checkpoint.open(whole.out).specs
    missing = {specs[name].layer for shard in whole.plan.layout if shard.filename not in kept for name in shard.names}
    assert [report.index for report in layers] == sorted(layer for layer in missing if layer is not None)


def test_a_finished_job_has_nothing_to_resume(folder: Path, whole: QuantizeResult) -> None:
    before = snapshot(whole.out)
    calibrate(folder, whole.out, shard_size=SMALL, resume=True)
    assert snapshot(whole.out) == before


def test_a_lost_layer_is_solved_again(folder: Path, whole: QuantizeResult, tmp_path: Path) -> None:
    """The first layer's shards are gone, the second's are whole: only the first is solved."""
    out = tmp_path / "q"
    with pytest.raises(Stop):
        calibrate(folder, out, shard_size=SMALL, **stop_after_layer(1))
    specs = Checkpoint.open(whole.out).specs
    for shard in whole.plan.layout:
        if specs[shard.names[0]].layer == 0:
            (out / shard.filename).unlink()
    layers: list[LayerReport] = []
    calibrate(folder, out, shard_size=SMALL, resume=True, on_layer=layers.append)
    assert [report.index for report in layers] == [0] and snapshot(out) == snapshot(whole.out)


@pytest.fixture(scope="module")
def begun(folder: Path) -> Path:
    """An output that was stopped after its first layer."""
    with pytest.raises(Stop):
        calibrate(folder, folder / "begun", shard_size=SMALL, **stop_after_layer(0))
    return folder / "begun"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"calibration": known.text(seed=1)}, ["calibration.sha256"]),
        ({"samples": SAMPLES - 1}, ["calibration.samples was 4, now 3", "calibration.tokens"]),
        ({"seq_len": SEQ_LEN // 2}, ["calibration.seq_len was 32, now 16"]),
        ({"samples": SAMPLES - 1, "seed": 7}, ["calibration.seed was 0, now 7"]),
        ({"damp": 0.02}, ["settings.damp was 0.01, now 0.02"]),
        ({"act_order": False}, ["settings.act_order was True, now False"]),
        ({"sweeps": 2}, ["settings.sweeps was 1, now 2"]),
        ({"router_weights": True}, ["settings.router_weights was False, now True"]),
        ({"method": "gptq", "group_size": 64}, ["settings.method was 'nf4', now 'gptq'"]),
        ({"double_quant": False}, ["settings.double_quant"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_resuming_something_else_is_refused(
    folder: Path, begun: Path, tmp_path: Path, change: dict[str, Any], named: list[str]
) -> None:
    before = snapshot(begun)
    if "calibration" in change:
        (tmp_path / "text.txt").write_text(change["calibration"])
        change = {"calibration": tmp_path / "text.txt"}
    with pytest.raises(CheckpointError, match="was begun differently") as caught:
        calibrate(folder, begun, resume=True, **({"shard_size": SMALL} | change))
    for text in named:
        assert text in str(caught.value), str(caught.value)
    assert snapshot(begun) == before


def test_resuming_without_calibration_is_refused(folder: Path, begun: Path) -> None:
    with pytest.raises(CheckpointError, match=r"settings\.damp was 0\.01, now None"):
        quantize(folder / "source", begun, resume=True, shard_size=SMALL, device="cpu")


def left_whole(out: Path) -> bool:
    """Whether there is nothing but the journal and the shards that it records, with their hashes."""
    _, sealed = read_journal(out / JOURNAL)
    files = {path.name: path for path in out.iterdir() if path.name != JOURNAL}
    return files.keys() == sealed.keys() and all(file_sha256(files[name]) == sealed[name].sha256 for name in files)


def test_strict_makes_a_fallback_an_error(folder: Path, whole: QuantizeResult, tmp_path: Path) -> None:
    """Layer and expert are named, and what is left are whole shards and the journal."""
    out = tmp_path / "q"
    with pytest.raises(CalibrationError) as caught:
        calibrate(folder, out, shard_size=SMALL, strict=True)
    assert f"layer 0: 2 experts get fewer than {MIN_TOKENS} tokens (expert 0: 0)" in str(caught.value)
    assert left_whole(out)
    with pytest.raises(CheckpointError):
        Checkpoint.open(out)
    calibrate(folder, out, shard_size=SMALL, resume=True)  # without `strict` it goes on
    assert snapshot(out) == snapshot(whole.out)


def fails(broken: Path, kind: type[Exception], *texts: str, **settings: Any) -> str:
    """The job raises `kind` with all of `texts`, and leaves nothing half-written."""
    with pytest.raises(kind) as caught:
        calibrate(broken, broken / "q", **settings)
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert left_whole(broken / "q")
    return str(caught.value)


@pytest.mark.parametrize("expert", [ONCE, EXPERTS - 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(broken: Path, expert: int, bad: float) -> None:
    """File and tensor are named, whether the expert has tokens or falls back."""
    name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 7] = bad

    edit(broken / "source", spoil)
    fails(broken, CheckpointError, "model-00002-of-00002.safetensors", name, "NaN or infinite")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.norm.weight", "model.layers.1.block_sparse_moe.gate.weight"]
)
def test_a_kept_weight_that_is_no_number(broken: Path, name: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    edit(broken / "source", spoil)
    fails(broken, CheckpointError, ".safetensors", name, "NaN or infinite")


@pytest.mark.parametrize(
    ("norm", "receiver"),
    [
        ("model.layers.1.input_layernorm.weight", r"layer 1: model\.layers\.1\.self_attn\.q_proj\.weight"),
        ("model.layers.0.self_attn.norm.weight", r"layer 0: model\.layers\.0\.self_attn\.out_proj\.weight"),
        ("model.layers.0.post_attention_layernorm.weight", r"layer 0: model\.layers\.0\..*experts\.\d\.w1\.weight"),
    ],
)
def test_activations_that_overflow(broken: Path, norm: str, receiver: str) -> None:
    """Layer and tensor are named."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[norm].fill_(1e38)

    edit(broken / "source", spoil)
    message = fails(broken, CalibrationError, "receives NaN or infinite activations")
    assert re.search(receiver, message), message


def test_outputs_that_overflow(broken: Path) -> None:
    """All inputs are finite, but what an expert that is only rounded gives is not: the layer is named."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.1.block_sparse_moe.experts.{ONCE}.w2.weight"].fill_(3e38)

    edit(broken / "source", spoil)
    fails(broken, CalibrationError, "layer 1: the outputs have NaN or infinite values")


@pytest.mark.parametrize(
    ("size", "method"), [(1e10, {"method": "gptq", "group_size": 64}), (1e20, {}), (2e38, {})],
    ids=["beyond float16 scales", "squares overflow", "nearly infinite"],
)  # fmt: skip
def test_weights_that_are_too_large(broken: Path, size: float, method: dict[str, Any]) -> None:
    """Finite, but neither to be stored nor to be measured: layer or tensor are named, no NaN gets into a manifest."""
    name = f"model.layers.1.block_sparse_moe.experts.{EXPERTS - 1}.w2.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        weight = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(0)) - 0.5
        tensors[name].copy_(weight * size)

    edit(broken / "source", spoil)
    with pytest.raises(MinibbleError, match=rf"layer 1|{re.escape(name)}"):
        calibrate(broken, broken / "q", **method)


def test_a_hopeless_hessian(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no damping makes positive definite: layer and tensor are named."""

    def never(*args: Any) -> Any:
        raise CalibrationError("a Hessian is not positive definite even with a damp of 100")

    monkeypatch.setattr(solver, "factor", never)
    with pytest.raises(CalibrationError, match=r"layer 0.*model\.layers\.0\.self_attn\.qkv_proj\.weight"):
        calibrate(folder, tmp_path / "q")


def test_another_plan_gives_the_same_bytes(
    folder: Path, whole: QuantizeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts one by one instead of all together, activations on disk instead of in memory."""
    assert EXPERTS > 2
    roomy = open_job(folder / "source", tmp_path / "q", calibration=folder / "text.txt", **SETTINGS)
    assert isinstance(roomy, CalibratedJob) and roomy.memory.experts_at_once == EXPERTS
    assert {roomy.memory.hidden, roomy.memory.mixed, roomy.memory.sums} == {"host"}
    monkeypatch.setattr(plan, "EXPERTS_AT_ONCE", 1)
    least = plan.plan_calibration(roomy.source.config, SAMPLES, SEQ_LEN, roomy.device, Budget(0, 1 << 40, 1 << 40))
    stores = TOKENS * (64 + 64 + 64) * 4
    monkeypatch.setattr(job, "free_budget", lambda *args: Budget(0, least.host_bytes - stores, 1 << 40))
    frugal = open_job(folder / "source", tmp_path / "q", calibration=folder / "text.txt", **SETTINGS)
    assert isinstance(frugal, CalibratedJob) and frugal.memory.experts_at_once == 1
    assert {frugal.memory.hidden, frugal.memory.mixed, frugal.memory.sums} == {"disk"}
    result = calibrate(folder, tmp_path / "q", shard_size=SMALL)
    assert snapshot(result.out) == snapshot(whole.out)


def test_too_little_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written."""
    monkeypatch.setattr(job, "free_budget", lambda *args: Budget(0, 1000, 1 << 40))
    with pytest.raises(BudgetError, match="host memory"):
        calibrate(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_what_needs_calibration(folder: Path, tmp_path: Path) -> None:
    """NF4 alone rounds to nearest; gptq has a text of its own; options without a text are refused."""
    source = folder / "source"
    assert isinstance(open_job(source, tmp_path / "q", device="cpu"), NearestJob)
    gptq = open_job(source, tmp_path / "q", method="gptq", group_size=32, samples=2, seq_len=16, device="cpu")
    assert isinstance(gptq, CalibratedJob) and gptq.text.source == "demo" and gptq.text.samples == 2
    with pytest.raises(ConfigError, match="damp"):
        open_job(source, tmp_path / "q", damp=0.1)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"damp": -0.1}, "damp -0.1"),
        ({"damp": float("nan")}, "damp nan"),
        ({"sweeps": -1}, "-1 sweeps"),
        ({"method": "gptq", "group_size": 8}, "group size 8"),
        ({"method": "gptq", "group_size": 128}, "128"),
        ({"method": "awq"}, "awq"),
    ],
)
def test_settings_that_cannot_be(folder: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        calibrate(folder, tmp_path / "q", **settings)
    assert not (tmp_path / "q").exists()
