"""`minibble doctor`."""

import pytest

from minibble.cli import doctor


def test_json(cli_json) -> None:
    found = cli_json("doctor")
    assert found["ok"]
    assert found["packages"]["torch"]
    assert found["problems"] == []
    assert found["memory_bytes"] > 0
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["nf4_path"] in doctor.NF4_PATHS
    assert found["cpu"]["int4_path"] in doctor.INT4_PATHS
    assert found["can"]


def test_table(cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0
    words = ("Python", "torch", "CPU", "int4 products", "memory", "GPU", "can quantize")
    assert all(word in result.stdout for word in words)


def test_missing_package_that_is_needed(cli, monkeypatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "transformers" else version(name))
    result = cli("doctor")
    assert result.exit_code == 1
    assert "transformers is missing: pip install transformers" in result.stdout


def test_missing_package_that_is_useful(cli, cli_json, monkeypatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "bitsandbytes" else version(name))
    assert cli_json("doctor")["packages"]["bitsandbytes"] is None
    assert "pip install 'minibble[cpu]'" in cli("doctor").stdout


@pytest.mark.parametrize(("gpu", "whole"), [(80e9, False), (300e9, True)])
def test_what_fits_a_gpu(gpu: float, whole: bool) -> None:
    findings = doctor.Findings("3", {}, {}, memory_bytes=1, disk_free_bytes=1)
    findings.gpus = [{"memory_bytes": int(gpu), "free_bytes": int(gpu), "path": "decode"}]
    doctor._judge(findings)
    assert any("GPU memory" in text for text in findings.can) == whole
    assert any("GPU memory" in text for text in findings.cannot) != whole


@pytest.mark.parametrize(
    ("free", "host", "said"),
    [
        ((300e9,), 8e9, "run it on 1 of 1 GPUs as they are now: 9"),
        ((80e9, 40e9), 400e9, "of experts in host memory"),
        ((80e9,), 8e9, "fit on no GPU"),
        ((8e9,), 400e9, "more on cuda:0 would do"),
    ],
)
def test_how_it_would_run(free: tuple[float, ...], host: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import minibble.runtime.experts.host

    monkeypatch.setattr(minibble.runtime.experts.host, "available_nbytes", lambda: int(host))
    findings = doctor.Findings("3", {}, {}, memory_bytes=1, disk_free_bytes=1)
    findings.gpus = [{"memory_bytes": int(size), "free_bytes": int(size), "path": "hopper"} for size in free]
    doctor._judge(findings)
    (text,) = (text for text in (*findings.can, *findings.cannot) if text.startswith("run it"))
    assert said in text and (text in findings.can) == ("expected" in text)
