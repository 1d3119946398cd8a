"""The benchmarks of whole layers, small and on the CPU, with a clock of their own."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from golden import bench_results

from minibble.quantize.config import ModelConfig
from minibble.quantize.nf4 import NF4
from minibble.runtime.bench import gpu, layers, whole
from minibble.runtime.bench.check import WrongResult
from minibble.runtime.decode import decode_step

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
SMALL = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "rotary_dim": 32, "num_local_experts": 8}  # fmt: skip


def small_config(pattern: tuple[int, ...] = layers.PATTERN) -> ModelConfig:
    return layers.real_config(pattern, **SMALL)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in place of a GPU: what only a GPU can say is made up."""
    monkeypatch.setattr(gpu, "ceilings", lambda device: bench_results.CEILINGS)
    monkeypatch.setattr(gpu, "hardware", lambda device: bench_results.HARDWARE)


def test_the_pattern_of_the_released_model() -> None:
    config = layers.real_config()
    assert config.attention == ("lightning",) * 7 + ("softmax",)
    assert (config.hidden_size, config.intermediate_size, config.num_experts) == (6144, 9216, 32)
    assert config.vocab_size == layers.VOCABULARY


def test_the_same_seed_gives_the_same_model() -> None:
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        first, again, other = (
            layers.random_model(small_config((0, 1)), NF4(), CPU, seed)(ids).logits for seed in (0, 0, 1)
        )
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert 0.3 < first.std() < 3


def test_a_state_that_tokens_could_have_left() -> None:
    model = layers.random_model(small_config((0, 1)), NF4(), CPU)
    state = layers.random_state(model, 3, 17, room=5)
    assert state.length == 17 and state.capacity == 22 and state.lightning[0].shape == (3, 4, 64, 64)
    with torch.inference_mode():
        logits = decode_step(model, whole.step_inputs(model, torch.tensor([1, 2, 3]), state), state)
    assert logits.shape == (3, layers.VOCABULARY) and logits.isfinite().all()


def test_layers_that_are_right() -> None:
    with torch.inference_mode():
        errors = whole.check_layers(small_config((0, 1)), NF4(), CPU, prompt=(4, 10))
    assert 0 < errors["prefill"] < whole.BOUND and 0 < errors["decode"] < whole.BOUND


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_layers_that_are_wrong(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "decode_step", lambda *args: decode_step(*args) * factor)
    with torch.inference_mode(), pytest.raises(WrongResult, match="decode: the logits of 100%"):
        whole.check_layers(small_config((0, 1)), NF4(), CPU, prompt=(4, 10))


def test_which_kernels_are_chosen_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("MINIBBLE_KERNELS", raising=False)
    with whole.kernels("reference"):
        assert os.environ["MINIBBLE_KERNELS"] == "reference"
    assert "MINIBBLE_KERNELS" not in os.environ


def test_times_of_kernels_by_their_place_in_a_layer() -> None:
    launches = (
        [("product", 1.0), ("norm", 0.5), ("product", 3.0)] * 2 + [("head", 9.0), ("odd", 1.0)] + [("odd", 1.0)] * 2
    )
    assert list(whole._summed(launches, layers=2).items()) == [
        ("head", 9.0),
        ("product (2 of 2 in a layer)", 6.0),
        ("odd", 3.0),
        ("product (1 of 2 in a layer)", 2.0),
        ("norm", 1.0),
    ]


def test_decode_layer(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("decode_layer")
    monkeypatch.setattr(module, "real_config", lambda pattern=layers.PATTERN: small_config(pattern))
    monkeypatch.setattr(module, "kernel_times_us", lambda call, count: {"a kernel": 1.0})
    times: list[float] = []

    def graph_us(calls: Any) -> float:
        assert calls[0]().isfinite().all()
        times.append(808.0 if len(times) % 2 == 0 else 8.0)  # with layers, without
        return times[-1]

    monkeypatch.setattr(gpu, "graph_us", graph_us)
    with torch.inference_mode():
        result = module.measure(CPU, 33, [1, 3])
    for found in result["formats"].values():
        one, three = found["rows"]
        assert (one["batch"], one["us"], three["batch"], three["us"]) == (1, 100.0, 3, 100.0)
        assert one["share"] == pytest.approx(one["nbytes"] / 3090e3 / 100, abs=1e-4)
        assert found["errors"]["decode"] < whole.BOUND
    assert any("100.0 us a layer" in line for line in module.lines(json.loads(json.dumps(result))))


def test_prefill_layers(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("prefill_layers")
    monkeypatch.setattr(module, "real_config", lambda pattern=layers.PATTERN: small_config(pattern))
    monkeypatch.setattr(module, "kernel_times_us", lambda call, count: {"a kernel": 1.0})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with torch.inference_mode():
        result = module.measure(CPU, 24, [8, 24], (0, 1))
    assert [row["chunk"] for row in result["formats"]["nf4-dq"]["rows"]] == [8, 24]
    assert result["flops"]["experts"] == 2 * (2 * 24 * 2 * 3 * 256 * 384)
    assert len(module.lines(json.loads(json.dumps(result)))) == 1 + 2 * 4


def test_what_a_time_means() -> None:
    module = script("prefill_layers")
    found = module.figures(0.2, tokens=8192, layers=8, flops=80 * 10**12, ceilings={"bf16_TFLOP_per_s": 800.0})
    assert found == {"seconds": 0.2, "TFLOP_per_s": 400.0, "share": 0.5, "tokens_per_s": 4096}
