"""Makes the oracles of `tests/golden` importable as `golden`; the built-in model in 4 bits."""

import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)


@pytest.fixture(scope="session")
def demo_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, quantized to NF4."""
    from minibble.quantize.builtin import demo_path
    from minibble.quantize.job import quantize_checkpoint

    return quantize_checkpoint(demo_path(), tmp_path_factory.mktemp("demo") / "nf4", device="cpu").out


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The CPU in place of a GPU; see `golden/placed.py`."""
    from golden.placed import replace_gpu

    return replace_gpu(monkeypatch)
