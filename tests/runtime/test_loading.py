"""Loading is strict: every tensor once, every expert 4-bit where the file says so, nothing derived from a file."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from minibble.quantize.builtin import demo_path
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import BudgetError, CheckpointError, ConfigError
from minibble.quantize.inventory import TensorSpec, inventory
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime.kernels.linear4 import cpu
from minibble.runtime.loading import load
from minibble.runtime.model import MiniMaxForCausalLM

IDS = torch.tensor(tiny.prompts((21, 21), seed=5))
NAME = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_source: Make) -> Path:
    """A random 16-bit checkpoint in the original spelling, without a tokenizer."""
    return without_tokenizer(make_source(tmp_path_factory.mktemp("source") / "m", config=tiny.original_json()))


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in NF4."""
    out = tmp_path_factory.mktemp("quantized") / "m"
    quantize_checkpoint(source, out)
    return out


def without_tokenizer(folder: Path) -> Path:
    for extra in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / extra).unlink(missing_ok=True)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def rewritten(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint as one shard, its tensors changed by `change`."""
    tensors = tensors_of(folder)
    change(tensors)
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def logits(model: MiniMaxForCausalLM) -> Tensor:
    return model(input_ids=IDS).logits


def decoded_by_bitsandbytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, float32, each 4-bit one decoded by bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes").functional
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".weight"):
            continue
        parts = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
        if parts:
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            tensor = functional.dequantize_4bit(tensor, state)
        found[name] = tensor.float()
    return found


def dense(config: ModelConfig, weights: dict[str, Tensor]) -> MiniMaxForCausalLM:
    model = MiniMaxForCausalLM.random(config).eval()
    with torch.no_grad():
        for name, view in model.named_weights():
            view.copy_(weights[name])
    return model


def test_16_bit_weights_arrive_unchanged(source: Path) -> None:
    model, stored = load(source, dtype=torch.float32), tensors_of(source)
    loaded = dict(model.named_weights())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


@pytest.mark.parametrize("names", ["hf", "fused"])
def test_names_of_other_tools_load_alike(names: str, source: Path, make_source: Make, tmp_path: Path) -> None:
    other = without_tokenizer(make_source(tmp_path / "m", config=tiny.original_json(), names=names))
    assert torch.equal(logits(load(other, dtype=torch.float32)), logits(load(source, dtype=torch.float32)))


@pytest.mark.parametrize("which", ["source", "quantized", "int4"])
def test_every_tensor_is_read_exactly_once(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(which)
    read: Counter[str] = Counter()
    original = Checkpoint.read

    def counting(self: Checkpoint, spec: Any, *args: Any, **kwargs: Any) -> Any:
        read[spec.name] += 1
        return original(self, spec, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", counting)
    model = load(folder)
    assert read == Counter(spec.name for spec in inventory(model.minibble))


@pytest.mark.parametrize(
    "options", [{}, {"double_quant": False}, {"quantize_head": True, "quantize_embedding": True}], ids=str
)
@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_4_bit_equals_the_decoded_weights(
    options: dict[str, bool], kernels: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "reference":
        monkeypatch.setenv("MINIBBLE_KERNELS", "reference")
    quantize_checkpoint(source, tmp_path / "q", **options)
    model = load(tmp_path / "q", dtype=torch.float32)
    expected = logits(dense(model.minibble, decoded_by_bitsandbytes(tensors_of(tmp_path / "q"))))
    difference = (logits(model) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    with torch.no_grad():
        single = model(input_ids=IDS[:1, :1]).logits  # one token goes another way
    assert (single[0, 0] - expected[0, 0]).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("which", ["quantized", "int4"])
def test_4_bit_in_bf16_follows_float32(which: str, request: pytest.FixtureRequest) -> None:
    """Whatever kernel this CPU has for bfloat16, batch and single tokens."""
    folder = request.getfixturevalue(which)
    expected = logits(load(folder, dtype=torch.float32))
    model = load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    found = logits(model)
    assert found.dtype == torch.float32
    # The median: where rounding sends a token to other experts, all that follows differs.
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.1
    with torch.no_grad():
        state = model(input_ids=IDS[:1, :-1], use_cache=True).past_key_values
        single = model(input_ids=IDS[:1, -1:], past_key_values=state).logits[0, 0]
    assert (single - expected[0, -1]).norm() / expected[0, -1].norm() < 0.15


def test_4_bit_is_held_in_4_bit(quantized: Path) -> None:
    """The loaded matrices take no more than half a byte a weight, scales apart."""
    from minibble.runtime.layers import Linear

    model = load(quantized, dtype=torch.float32)
    packed = [m for m in model.modules() if isinstance(m, Linear) and m.packed is not None]
    weights = sum(m.shape[0] * m.shape[1] for m in packed)
    expected = sum(spec.numel for spec in inventory(model.minibble) if spec.role in ("attention", "expert"))
    assert weights == expected
    assert sum(m.packed.nbytes for m in packed) <= weights * (0.5 + 4 / 64)


@pytest.fixture(scope="module")
def int4(source: Path, make_int4: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in GPTQ's int4, groups of 64."""
    return make_int4(source, tmp_path_factory.mktemp("int4") / "m", 64)


def decoded_like_gptq(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, float32, each int4 one decoded column by column as its file says."""
    found = {name: tensor.float() for name, tensor in tensors.items() if name.endswith(".weight")}
    shifts = torch.arange(0, 32, 4)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        qweight, qzeros, scales, g_idx = (tensors[f"{module}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx"))
        codes_KN = ((qweight[:, None] >> shifts[:, None]) & 15).flatten(0, 1)
        zeros_GN = ((qzeros[:, :, None] >> shifts) & 15).flatten(1) + 1
        found[f"{module}.weight"] = (scales.float()[g_idx] * (codes_KN - zeros_GN[g_idx])).t()
    return found


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_int4_equals_the_decoded_weights(
    group: int, kernels: str, source: Path, make_int4: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "reference":
        monkeypatch.setenv("MINIBBLE_KERNELS", "reference")
    folder = make_int4(source, tmp_path / "q", group)
    model = load(folder, dtype=torch.float32)
    expected = logits(dense(model.minibble, decoded_like_gptq(tensors_of(folder))))
    assert (logits(model) - expected).abs().max() / expected.abs().max() < 1e-5
    with torch.no_grad():
        single = model(input_ids=IDS[:1, :1]).logits  # one token goes another way
    assert (single[0, 0] - expected[0, 0]).abs().max() / expected.abs().max() < 1e-5


def test_int4_embedding_and_head(make_source: Make, make_int4: Make, tmp_path: Path) -> None:
    """A row of zeros in the head is found among its codes too."""
    folder = without_tokenizer(make_source(tmp_path / "m", config=tiny.original_json(vocab_size=104)))
    unused = torch.tensor([5, 103])
    zeroed = rewritten(folder, tmp_path / "z", lambda tensors: tensors["lm_head.weight"].index_fill_(0, unused, 0))  # type: ignore[arg-type]
    out = make_int4(zeroed, tmp_path / "q", 32, everything=True)
    model = load(out, dtype=torch.float32)
    expected = logits(dense(model.minibble, decoded_like_gptq(tensors_of(out))))
    assert (logits(model) - expected).abs().max() / expected.abs().max() < 1e-5
    assert model.unused_ids is not None and model.unused_ids.tolist() == [5, 103]


def test_an_int4_matrix_of_another_kind_is_an_error(int4: Path, tmp_path: Path) -> None:
    g_idx = f"{NAME.removesuffix('.weight')}.g_idx"
    folder = rewritten(int4, tmp_path / "m", lambda tensors: tensors.update({g_idx: tensors[g_idx].flip(0)}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.weight: g_idx is not sequential"):
        load(folder)


@pytest.mark.parametrize("which", ["quantized", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["decoded", "fused"])
def test_weights_take_what_was_planned(
    which: str, dtype: torch.dtype, fused: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs with AVX512-BF16 and on those without: laying out needs neither, only multiplying would."""
    if fused and cpu.bitsandbytes() is None:
        pytest.skip("bitsandbytes is not installed")
    monkeypatch.setattr(cpu, "has_fused", lambda: fused)
    report = load(request.getfixturevalue(which), dtype=dtype).memory_report()
    assert report["measured"]["weights_bytes"] == report["predicted"]["weights_bytes"]


@pytest.mark.parametrize("layout", [{"intermediate_size": 20}, {"head_dim": 6, "rotary_dim": 4}], ids=str)
def test_blocks_across_rows_are_right_or_refused(layout: dict[str, int], make_source: Make, tmp_path: Path) -> None:
    """Matrices that do not end on a whole block: no silent garbage."""
    config = tiny.original_json(hidden_size=40, **layout)
    folder = without_tokenizer(make_source(tmp_path / "m", config=config))
    try:
        quantize_checkpoint(folder, tmp_path / "q")
        model = load(tmp_path / "q", dtype=torch.float32)
    except (CheckpointError, ConfigError):
        return
    expected = logits(dense(model.minibble, decoded_by_bitsandbytes(tensors_of(tmp_path / "q"))))
    assert (logits(model) - expected).abs().max() / expected.abs().max() < 1e-5


def test_an_expert_left_in_16_bit_is_an_error(quantized: Path, source: Path, tmp_path: Path) -> None:
    def leave(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(NAME)]:
            del tensors[name]
        tensors[NAME] = tensors_of(source)[NAME]

    with pytest.raises(CheckpointError, match=r"experts\.2\.w2"):
        load(rewritten(quantized, tmp_path / "m", leave))


@pytest.mark.parametrize(
    "name", [NAME, "model.norm.weight", "model.layers.0.self_attn.output_gate.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("which", ["source", "quantized"])
def test_a_missing_tensor_is_an_error(name: str, which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = rewritten(request.getfixturevalue(which), tmp_path / "m", lambda tensors: tensors.pop(name))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_state.bitsandbytes__nf4", "quant_map"])
def test_a_missing_scale_is_an_error(part: str, quantized: Path, tmp_path: Path) -> None:
    folder = rewritten(quantized, tmp_path / "m", lambda tensors: tensors.pop(f"{NAME}.{part}"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=part.split(".")[0]):
        load(folder)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.q_norm.weight", "model.layers.8.input_layernorm.weight", "lm_head.bias"]
)
def test_a_tensor_left_over_is_an_error(extra: str, source: Path, tmp_path: Path) -> None:
    folder = rewritten(source, tmp_path / "m", lambda tensors: tensors.update({extra: torch.ones(4)}))
    with pytest.raises(CheckpointError, match=extra.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("which", ["source", "quantized"])
def test_stored_decays_are_ignored(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """transformers saves its decays, rounded: garbage in their place changes nothing."""
    folder = request.getfixturevalue(which)

    def add(tensors: dict[str, Tensor]) -> None:
        for buffer in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
            tensors[f"model.layers.0.self_attn.{buffer}"] = torch.full((4, 1, 1), 1e3, dtype=torch.bfloat16)

    garbage = load(rewritten(folder, tmp_path / "m", add), dtype=torch.float32)
    assert torch.equal(logits(garbage), logits(load(folder, dtype=torch.float32)))


def test_no_alpha_no_model(source: Path, tmp_path: Path) -> None:
    import json

    folder = rewritten(source, tmp_path / "m", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    del config["layernorm_mlp_alpha"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="layernorm_mlp_alpha"):
        load(folder)


@pytest.mark.parametrize("which", ["quantized", "int4"])
def test_a_model_is_ready_to_run(which: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(which))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.tokenizer is None
    assert model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (2, 23)


def test_too_little_memory_is_said_before_anything_is_read(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read before the budget was checked"))
    with pytest.raises(BudgetError):
        load(quantized, gpu_memory=1000)


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99", "cuda:-2", ""])
def test_unknown_devices(device: str, quantized: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        load(quantized, device=device)


@pytest.mark.parametrize("missing", ["", "config.json"])
def test_no_checkpoint_there(missing: str, tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "nothing"
    if missing:
        folder = rewritten(source, tmp_path / "m", lambda tensors: None)
        (folder / missing).unlink()
    with pytest.raises((CheckpointError, ConfigError)):
        load(folder)


def test_a_broken_tokenizer_is_said_so(source: Path, tmp_path: Path) -> None:
    folder = rewritten(source, tmp_path / "m", lambda tensors: None)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(folder)


def test_demo_brings_its_tokenizer() -> None:
    if not (demo_path() / "config.json").is_file():
        pytest.skip("the built-in model is not there yet")
    model = load("demo")
    ids = model.tokenizer("def ", return_tensors="pt").input_ids
    text = model.tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("def ") or text.endswith(" ") or len(text) > 4
    assert model.generation_config.eos_token_id is not None


@pytest.mark.parametrize("device", ["cpu,cuda:0", ["cpu", "cuda:0"], [], "cpu,"])
def test_several_devices_are_gpus(device: object, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device"):
        load(quantized, device=device)  # type: ignore[arg-type]


def test_progress_counts_what_is_on_disk(quantized: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    model = load(quantized, progress=lambda *told: seen.append(told))
    checkpoint = model.checkpoint
    total = sum(map(checkpoint.stored_nbytes, checkpoint.inventory))
    assert {told[1] for told in seen} == {total} and seen[0][0] == 0 < seen[-1][0] < total
    assert [told[0] for told in seen] == sorted(told[0] for told in seen)
    assert all(told[2] in checkpoint.specs for told in seen)


def test_a_failure_in_the_middle_of_loading(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that was raised, and no reader is left behind."""
    import threading

    plain, before = Checkpoint.read, threading.active_count()

    def fail(self: Checkpoint, spec: TensorSpec) -> object:
        if spec.layer == 1:
            raise CheckpointError(f"{spec.name}: unreadable")
        return plain(self, spec)

    monkeypatch.setattr(Checkpoint, "read", fail)
    with pytest.raises(CheckpointError, match=r"layers\.1.*unreadable"):
        load(quantized)
    for thread in threading.enumerate():
        if thread.name.startswith("read"):
            thread.join(5)
    assert threading.active_count() <= before
