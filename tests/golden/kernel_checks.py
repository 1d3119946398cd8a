"""How kernels are tested: outputs poisoned, and Triton's on the CPU through its interpreter."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to holds NaN, or the largest number where it holds integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(4).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def interpreted(module: str, function: str) -> None:
    """Call `function` of the kernel tests' `module` in a process of its own, which interprets Triton kernels.

    The interpreter must be chosen before triton is imported.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    path = os.pathsep.join([str(TESTS / "kernels"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    program = f"import {module}\n{module}.{function}()\n"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
