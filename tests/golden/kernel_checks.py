"""How kernels are tested: outputs poisoned and compared, Triton's through its interpreter, CUDA C++ compiled."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minibble.runtime.kernels import nvrtc

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


def relative(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of `exact`, in float64."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def compiler() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        from cuda.bindings import nvrtc as library

        library.nvrtcVersion()
    except Exception as error:  # the package or the library it loads is missing
        return f"no NVRTC: {error}"
    return None


needs_nvrtc = pytest.mark.skipif(compiler() is not None, reason=str(compiler()))


def compiled(kernel: nvrtc.Kernel, arch: str) -> bytes:
    """`kernel` as machine code for `arch`, or as PTX."""
    text = "\n".join(path.read_text() for path in kernel.sources)
    return nvrtc._compile(text, kernel.sources[-1].name, kernel.macros, arch)
