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
