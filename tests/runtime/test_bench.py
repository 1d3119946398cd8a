"""The benchmark of the kernels, with a clock that runs without a GPU: what is checked, counted, timed and told."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minibble.quantize.builtin import builtin_config
from minibble.quantize.errors import ConfigError
from minibble.quantize.int4 import Int4
from minibble.quantize.inventory import active_parameters
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.runtime.bench import counts, gpu, kernels, lightning, linear, moe, peers, tables
from minibble.runtime.bench.check import WrongResult, checked
from minibble.runtime.bench.weights import generator_on, random_matrix, random_tensor
from minibble.runtime.kernels import reference_forced

CPU = torch.device("cpu")
FORMATS = {"nf4-dq": NF4(), "int4-g128": Int4(128)}
REAL = builtin_config("minimax-text-01")

needs_peer = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock that runs every call and finds that each took 10 us; how many calls each measurement had."""
    counted: list[int] = []

    def graph_us(calls: Sequence[Callable[[], Any]]) -> float:
        for call in calls:
            call()
        counted.append(len(calls))
        return 10.0

    monkeypatch.setattr(gpu, "graph_us", graph_us)
    monkeypatch.setattr(gpu, "ROTATED_NBYTES", 200_000)
    monkeypatch.setenv("MINIBBLE_KERNELS", "reference")
    monkeypatch.setattr(moe, "expert_table", PlainTable)
    return counted


class PlainTable:
    """What stands in for the table of records, which is for GPUs: float32, each token's experts one after the other."""

    def __init__(self, experts: Sequence[moe.Expert], *rest: Any):
        self.experts = [[decode(q) for q in expert] for expert in experts]

    def decode(self, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Tensor:
        """Float32 [A, M, D]."""
        out = torch.empty(ids_MA.shape[1], *y_MD.shape)
        for token, (ids, weights) in enumerate(zip(ids_MA.tolist(), weights_MA, strict=True)):
            for place, expert in enumerate(ids):
                gate, up, down = self.experts[expert]
                x = y_MD[token].float()
                out[place, token] = (torch.nn.functional.silu(gate @ x) * (up @ x)) @ down.t() * weights[place]
        return out


def measured_linear(tokens: Sequence[int] = (1, 3)) -> dict[str, Any]:
    return linear.measure(FORMATS, tokens, CPU, 2.0, lambda current: None, shape=(256, 512))


@needs_peer
def test_linear4_and_its_peers(clock: list[int]) -> None:
    result = measured_linear()
    held = 256 * 512 // 2 + 256 * 512 // 64 + 4 * 8  # codes, a byte a block, a float for 256 blocks
    assert result["nbytes"]["nf4-dq"] == held == result["nbytes"][peers.BITSANDBYTES]
    assert result["nbytes"][peers.CUBLAS] == 2 * 256 * 512
    for row in result["rows"]:
        ours = row["kernels"]["nf4-dq"]
        assert ours["us"] == 10.0
        assert ours["GB_per_s"] == pytest.approx(held / 10e3, abs=0.1)
        assert ours["share"] == pytest.approx(held / 10e3 / 2, rel=1e-3)
        assert 1e-4 < ours["error"] < 3e-3
    assert set(result["missing"]) == {peers.TORCH_INT4}, "torch's kernel is for CUDA"
    assert clock[0] == -(-200_000 // held), "weights in turn past the cache"
    json.dumps(result)


def test_a_peer_that_is_not_installed_is_named(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = measured_linear((1,))
    assert "ModuleNotFoundError" in result["missing"][peers.BITSANDBYTES]
    assert peers.BITSANDBYTES not in result["rows"][0]["kernels"]


def test_a_peer_that_is_wrong_is_named(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS["nf4"], peers.CUBLAS, lambda q: lambda x: x.new_ones(len(x), q.shape[0]))
    result = measured_linear((1,))
    assert "is off by" in result["missing"][peers.CUBLAS]


def test_nothing_is_timed_that_is_wrong(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.prepare

    def wrong(*args: Any) -> Any:
        packed = right(*args)
        return lambda x, out_dtype: packed(x, out_dtype) * 1.01

    monkeypatch.setattr(linear, "prepare", wrong)
    with pytest.raises(WrongResult, match=r"linear4 nf4-dq is off by 1\.\de-02"):
        measured_linear()
    assert clock == []


def test_unwritten_results_are_nan() -> None:
    """Also where the memory held the right numbers before."""
    with pytest.raises(WrongResult, match="nan"):
        checked("kernel", lambda: torch.empty(4, 64), torch.ones(4, 64))
    with pytest.raises(WrongResult, match="nan"):
        checked("kernel", lambda: torch.ones(4, 64).new_empty(4, 64, dtype=torch.bfloat16), torch.ones(4, 64))
    assert not torch.are_deterministic_algorithms_enabled()


SIZES = moe.Sizes(D=128, F=256, E=8, A=2)


def measured_moe(tokens: Sequence[int] = (1, 3)) -> dict[str, Any]:
    return moe.measure(FORMATS, tokens, CPU, 2.0, lambda current: None, SIZES)


@needs_peer
def test_moe4_and_its_peers(clock: list[int]) -> None:
    result = measured_moe()
    expert = 3 * (128 * 256 // 2 + 128 * 256 // 64 + 4 * 2)
    assert result["expert_nbytes"]["nf4-dq"] == expert
    one, several = result["rows"]
    assert one["M"] == 1 and one["touched"] == 2 and 2 < several["touched"] <= 6
    for row in (one, several):
        for kernel in ("nf4-dq", "int4-g128", peers.BITSANDBYTES):
            found = row["kernels"][kernel]
            assert found["us_per_expert"] == pytest.approx(10 / row["touched"], abs=0.01)
            assert found["error"] < (1e-2 if kernel == peers.BITSANDBYTES else 1e-6)
        assert row["kernels"]["nf4-dq"]["GB_per_s"] == pytest.approx(row["touched"] * expert / 10e3, abs=0.1)
    assert set(result["missing"]) == {peers.TORCH_INT4}


def test_routings_of_one_token_use_every_expert_once() -> None:
    routings = moe.make_routings(1, SIZES, generator_on(CPU, 0))
    assert sorted(torch.cat([ids for ids, _ in routings]).flatten().tolist()) == list(range(8))
    assert all(ids.dtype == torch.int32 and weights.dtype == torch.float32 for ids, weights in routings)


def test_routings_of_several_tokens_have_different_experts() -> None:
    for ids, weights in moe.make_routings(16, SIZES, generator_on(CPU, 0)):
        assert ids.shape == weights.shape == (16, 2)
        assert (ids[:, 0] != ids[:, 1]).all() and ids.min() >= 0 and ids.max() < 8
        assert torch.allclose(weights.sum(-1), torch.ones(16))


def measured_lightning(runs: Sequence[tuple[int, int]] = ((2, 1), (1, 9))) -> dict[str, Any]:
    ceilings = {"read_GB_per_s": 2.0, "bf16_TFLOP_per_s": 3.0}
    return lightning.measure(runs, CPU, ceilings, lambda current: None, heads=4, head_dim=16)


def test_lightning_and_its_floors(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIBBLE_KERNELS")
    decode, prefill = measured_lightning()["rows"]
    held = 2 * 2 * 5 * 4 * 16 + 2 * 4 * 2 * 4 * 16 * 16  # activations of two tokens in 16 bits, states there and back
    assert decode["floor_us"] == pytest.approx(held / 2e3, abs=0.01)
    assert prefill["tokens"] == 9 and prefill["us"] == 10.0
    assert 0 < decode["error"] < 3e-3 and 0 < prefill["error"] < 3e-3


def test_lightning_that_is_wrong(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIBBLE_KERNELS")
    right = lightning.gated_with_factors

    def wrong(*args: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        o, factors, state = right(*args)
        return o * (1 if reference_forced() else 1.01), factors, state

    monkeypatch.setattr(lightning, "gated_with_factors", wrong)
    with pytest.raises(WrongResult, match="lightning of 2 x 1 tokens"):
        measured_lightning()


def test_random_matrices_are_as_large_as_weights_are() -> None:
    for format in FORMATS.values():
        q = random_matrix((512, 1024), format, CPU, generator_on(CPU, 0))
        assert format.decode(q).std() == pytest.approx(1024**-0.5, rel=0.05)
        assert len(q.codes.unique()) == 256
    assert random_tensor((64, 64), 2.0, CPU, generator_on(CPU, 0)).float().std() == pytest.approx(2, rel=0.1)


def test_flops_are_two_for_each_active_weight_and_what_attention_adds() -> None:
    """Summed over the model they are those of its active parameters but for the norms."""
    layers = [counts.layer_flops(REAL, layer, 1) for layer in range(80)]
    weights = sum(part["projections"] + part["router"] + part["experts"] for part in layers) // 2
    norms = 80 * 2 * 6144 + 70 * 8192
    assert weights == active_parameters(REAL) - norms
    assert layers[0]["attention"] == 2 * 2 * 64 * 128 * 128
    assert counts.layer_flops(REAL, 7, 5)["attention"] == 4 * 64 * 128 * (1 + 2 + 3 + 4 + 5)
    assert counts.layer_flops(REAL, 7, 2, past=3)["attention"] == 4 * 64 * 128 * (4 + 5)


def test_bytes_of_a_decode_step() -> None:
    """facts: 14.02 GB of experts and 9.67 of attention a token, over 80 layers in NF4 with double quantization."""
    layers = [counts.decode_nbytes(REAL, layer, NF4(), context=4096) for layer in range(80)]
    assert sum(part["experts"] for part in layers) == pytest.approx(14.02e9, rel=1e-3)
    assert sum(part["attention"] for part in layers) == pytest.approx(9.67e9, rel=1e-3)
    assert sum(part["state"] for part in layers) == 70 * 2 * 4 * 64 * 128 * 128 + 4096 * 40960


@pytest.mark.parametrize("quick", [True, False])
def test_both_kernels_in_one_result(clock: list[int], quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_lightning = measured_lightning()
    monkeypatch.setattr(lightning, "measure", lambda *args: whole_lightning)
    for module, all_tokens in ((linear, (1, 2, 3)), (moe, (1, 4))):
        monkeypatch.setattr(module, "TOKENS", all_tokens)
        monkeypatch.setattr(module, "QUICK_TOKENS", all_tokens[:1])
    shape, sizes, whole = (256, 512), SIZES, (linear.measure, moe.measure)
    monkeypatch.setattr(linear, "measure", lambda *args: whole[0](*args, shape=shape))
    monkeypatch.setattr(moe, "measure", lambda *args: whole[1](*args, sizes=sizes))
    monkeypatch.setattr(gpu, "ceilings", lambda device: {"read_GB_per_s": 2.0, "bf16_TFLOP_per_s": 3.0})
    monkeypatch.setattr(gpu, "hardware", lambda device: {"gpu": "A GPU"})
    told: list[tuple[float, float]] = []
    result = kernels.measure(CPU, quick=quick, progress=lambda done, total, current: told.append((done, total)))
    assert [row["M"] for row in result["linear4"]["rows"]] == ([1] if quick else [1, 2, 3])
    assert [row["M"] for row in result["moe4"]["rows"]] == ([1] if quick else [1, 4])
    assert told[0][0] == 0 and told[-1] == (told[0][1], told[0][1])
    assert all(done <= total for done, total in told)
    assert result["versions"]["torch"] == torch.__version__ and json.dumps(result)


@needs_peer
def test_tables_from_the_json(clock: list[int]) -> None:
    result = json.loads(json.dumps(full_result()))
    head, rows = tables.linear4(result)
    assert head == ["M", "nf4-dq", peers.BITSANDBYTES, peers.CUBLAS, "int4-g128"]
    assert [row[0] for row in rows] == ["1", "128"]
    share = result["linear4"]["rows"][0]["kernels"]["nf4-dq"]["share"]
    assert rows[0][1] == f"10.0 ({share:.0%})" and rows[1][1] == "10.0"
    head, rows = tables.moe4(result)
    assert head[:2] == ["M", "experts read"] and rows[0][1] == "2"
    assert head[-2:] == ["nf4-dq, an expert over M = 1", "int4-g128, an expert over M = 1"]
    assert rows[0][-2:] == ["1.00", "1.00"]
    assert len(tables.missing(result)) == 1
    text = "\n".join(tables.lines(result))
    assert "A GPU: reads 2 GB/s" in text and f"not measured: {peers.TORCH_INT4}" in text


def full_result() -> dict[str, Any]:
    return {
        "hardware": {"gpu": "A GPU"},
        "formats": list(FORMATS),
        "ceilings": {"read_GB_per_s": 2.0, "bf16_TFLOP_per_s": 3.0},
        "linear4": measured_linear((1, 128)),
        "moe4": measured_moe((1, 16)),
        "lightning": measured_lightning(),
    }


def test_where_results_go(tmp_path: Path) -> None:
    path = gpu.result_path(tmp_path / "results", "kernels", "NVIDIA H100 80GB HBM3")
    assert path.name == "kernels_h100.json"
    assert gpu.result_path(tmp_path, "kernels", "NVIDIA H200").name == "kernels_h200.json"
    assert gpu.result_path(tmp_path, "kernels", "NVIDIA A10G").name == "kernels_nvidia_a10g.json"
    gpu.write_result(path, {"us": 1.0})
    assert json.loads(path.read_text()) == {"us": 1.0}


@pytest.mark.parametrize("device", [None, "cuda", "cuda:9", "cpu"])
def test_without_a_gpu_there_is_one_clear_error(device: str | None) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        gpu.the_gpu(device)


@pytest.mark.parametrize("device", ["cpu", "cuda:9", "gpu"])
def test_devices_that_are_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(ConfigError, match=device):
        gpu.the_gpu(device)
    assert gpu.the_gpu() == torch.device("cuda", 0)
