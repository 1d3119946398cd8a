"""`minibble bench`."""

import pytest
import torch
from golden import bench_results

import minibble.runtime.bench.gpu
import minibble.runtime.bench.kernels as kernels
from minibble.runtime.bench.check import WrongResult


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """A machine with a GPU whose kernels were measured before; what was asked of it."""
    calls: list[dict] = []

    def measure(device, **options):
        calls.append({"device": device, **options})
        options["progress"](1, 2, "linear4, M = 1")
        return bench_results.kernels()

    monkeypatch.setattr(minibble.runtime.bench.gpu, "the_gpu", lambda device: torch.device(device or "cuda:0"))
    monkeypatch.setattr(kernels, "measure", measure)
    return calls


@pytest.mark.parametrize("more", [[], ["--json"], ["--device", "cuda:1"], ["--full"]])
def test_without_a_gpu(cli, more) -> None:
    result = cli("bench", *more)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("minibble: error: there is no GPU") and result.stderr.count("\n") == 1


def test_quick_unless_asked_for_all(cli, asked) -> None:
    assert cli("bench").exit_code == 0 and cli("bench", "--full", "--device", "cuda:1").exit_code == 0
    assert [(call["device"], call["quick"]) for call in asked] == [
        (torch.device("cuda:0"), True),
        (torch.device("cuda:1"), False),
    ]


def test_tables(cli, asked) -> None:
    out = cli("bench").stdout
    words = (
        "H100",
        "3,090 GB/s",
        "781 TFLOP/s",
        "linear4, 6144 to 9216",
        "11.5 (82%)",
        "170.0",
        "2 of 32 experts",
        "2.25",
    )
    assert all(word in out for word in words), out
    assert out.count("not measured: bitsandbytes") == 1


def test_json(cli_json, asked) -> None:
    result = cli_json("bench")
    assert result["linear4"]["rows"][0]["kernels"]["nf4-dq"]["us"] == 11.5
    assert result["moe4"]["rows"][1]["touched"] == 20.5
    assert result["ceilings"]["read_GB_per_s"] == 3090


def test_a_wrong_kernel_is_one_line(cli, asked, monkeypatch) -> None:
    def measure(*args, **options):
        raise WrongResult("linear4 nf4-dq is off by 1e-01")

    monkeypatch.setattr(kernels, "measure", measure)
    result = cli("bench")
    assert result.exit_code == 1
    assert result.stderr == "minibble: error: linear4 nf4-dq is off by 1e-01\n"


# A whole model.

WHOLE = {
    "routing": "zipf", "load_s": 21.0,
    "plan": {
        "experts": {"resident": 1493, "pinned": 1067, "disk": 0}, "host_bytes": 93_500_000_000, "disk_bytes": 0,
        "expected_decode_tokens_per_s": 19.2, "embedding": "host",
    },
    "decode": [
        {
            "batch": 1, "context": 8192, "steps": 12, "tokens_per_s": 18.4, "predicted_bytes": [149_000_000_000],
            "memory": [{"device": "cuda:0", "driver_bytes": 148_500_000_000}],
            "experts": [{"hits": 90, "misses": 10}],
        },
        {"batch": 32, "context": 8192, "refused": "cuda:0 needs 167.1 GB"},
    ],
    "prefill": {"tokens": 8192, "tokens_per_s": 3210.0, "chunk": 8192},
}  # fmt: skip


@pytest.fixture
def whole(monkeypatch) -> list:
    from minibble.runtime.bench import full

    calls: list = []

    def measure(config, devices, run, progress):
        calls.append((config, devices, run))
        return WHOLE

    the_gpu = minibble.runtime.bench.gpu
    monkeypatch.setattr(the_gpu, "the_gpu", lambda device: torch.device(device or "cuda:0"))
    monkeypatch.setattr(the_gpu, "hardware", lambda device: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(full, "gate", lambda devices, format, progress, cpu_experts: {"prefill": 0.004})
    monkeypatch.setattr(full, "measure", measure)
    return calls


def test_a_whole_model_without_a_gpu(cli) -> None:
    result = cli("bench", "minimax-text-01", "--weights", "dummy")
    assert result.exit_code == 1 and result.stderr.startswith("minibble: error: there is no GPU")


def test_a_whole_model_needs_weights(cli) -> None:
    result = cli("bench", "minimax-text-01")
    assert result.exit_code == 2 and "--weights dummy" in result.stderr


@pytest.mark.parametrize("batch", ["0", "1,x", "-1", "1,,2"])
def test_numbers_of_sequences(cli, whole, batch: str) -> None:
    result = cli("bench", "minimax-text-01", "--weights", "dummy", "--batch", batch)
    assert result.exit_code == 1 and "--batch" in result.stderr and not whole


def test_what_is_asked_of_a_whole_model(cli_json, whole, tmp_path) -> None:
    result = cli_json(
        "bench", "minimax-text-01", "--weights", "dummy", "--routing", "zipf", "--gpu-memory", "228GB",
        "--host-memory", "64GiB", "--offload-folder", tmp_path, "--device", "cuda:0,cuda:1", "--batch", "1,32",
        "--context", "8Ki", "--prompt-tokens", "0",
    )  # fmt: skip
    ((config, devices, run),) = whole
    assert config.num_hidden_layers == 80 and devices == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert (run.gpu_memory, run.host_memory, run.folder) == (228 * 10**9, 64 * 2**30, tmp_path)
    assert (run.routing, run.batches, run.context, run.prompt) == ("zipf", (1, 32), 8192, 0)
    assert result["plan"] == WHOLE["plan"] and result["errors"] == {"prefill": 0.004}


def test_lines_of_a_whole_model(cli, whole) -> None:
    out = cli("bench", "minimax-text-01", "--weights", "dummy").stdout
    words = ("1493 experts on GPUs, 1067 in host memory (93.5 GB, the embedding among it)",
             "18.4 tokens/s after 8,192 (expected with 1: 19.2)", "0.5 experts missed a step",
             "148.50 GB in use, 149.00 planned", "batch 32: cuda:0 needs", "3,210 tokens/s")  # fmt: skip
    flat = " ".join(out.split())
    assert all(word in flat for word in words), out


@pytest.mark.parametrize(
    "options", [("--weights", "dummy"), ("--routing", "zipf"), ("--gpu-memory", "1GB"), ("minimax-text-01", "--full")]
)
def test_options_of_the_other_kind(cli, asked, whole, options: tuple[str, ...]) -> None:
    result = cli("bench", *options)
    assert result.exit_code == 2 and "is for" in result.stderr and not asked and not whole
