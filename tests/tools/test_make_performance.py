"""docs/performance.md is what the results say."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from golden import bench_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("make_performance", ROOT / "tools" / "make_performance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(tool) -> None:
    assert tool.render() == tool.TARGET.read_text(), "run python tools/make_performance.py"


def test_results_of_each_gpu(tool, tmp_path, monkeypatch) -> None:
    """Each GPU's file adds its tables, and without any there are none."""
    small = json.loads((tool.RESULTS / "small_kernels_h100.json").read_text())
    for path in tool.RESULTS.glob("*.json"):
        if not path.stem.endswith(("_h100", "_h200")):
            shutil.copy(path, tmp_path)
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert "Routed experts" not in tool.render()
    for name in ("kernels", "decode_layer", "prefill_layers"):
        result = getattr(bench_results, name)()
        (tmp_path / f"{name}_h100.json").write_text(json.dumps(result))
        (tmp_path / f"{name}_h200.json").write_text(json.dumps(result | {"hardware": {"gpu": "NVIDIA H200"}}))
    (tmp_path / "small_kernels_h100.json").write_text(json.dumps(small | {"rows": [small["rows"][0] | {"us": 6.44}]}))
    page = tool.render()
    assert page.count("## 4-bit products, NVIDIA H100") == page.count("## 4-bit products, NVIDIA H200") == 1
    assert "| 1 | 11.5 (82%) | 41.9 (87%) |" in page and "| 1024 | 170.0 | – |" in page
    assert "| 16 | 20.5 | 861.0 (70%) | 1.20 |" in page
    assert "| lightning | decode, 1 x 1 | 6.4 | 2.7 | 1.7e-03 |" in page
    assert "Not measured: bitsandbytes NF4-DQ (ModuleNotFoundError" in page
    assert "| NVIDIA H200 | nf4-dq | 99 | **141** | 700 |" in page
    assert "| NVIDIA H200 | nf4-dq | 8192 | 200 | 383 | 49% | 4,096 |" in page
