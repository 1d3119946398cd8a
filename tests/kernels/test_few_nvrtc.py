"""The kernels for few tokens: all their variants compile, without a GPU."""

import pytest

from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.linear4 import skinny, slices

SCALES = [(0, 64), (1, 64), (2, 128), (2, 64), (2, 32)]


def code_of(kernel: nvrtc.Kernel, arch: str) -> bytes:
    pytest.importorskip("cuda.bindings.nvrtc", reason="no NVRTC", exc_type=ImportError)
    text = "\n".join(path.read_text() for path in kernel.sources)
    return nvrtc._compile(text, kernel.sources[-1].name, kernel.macros, arch)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("warps", skinny.WARPS)
@pytest.mark.parametrize(("kind", "columns"), SCALES)
@pytest.mark.parametrize(("stride", "divided"), [(128, False), (256, True)])
def test_jobs(arch: str, warps: int, kind: int, columns: int, stride: int, divided: bool) -> None:
    """The smaller table; experts in part."""
    assert b"skinny" in code_of(skinny._kernel(warps, kind, columns, stride, divided), arch)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("warps", [12, 16])
@pytest.mark.parametrize(("kind", "columns"), SCALES)
@pytest.mark.parametrize(("tokens", "stride"), [(8, 256), (16, 128)])
def test_slices(arch: str, warps: int, kind: int, columns: int, tokens: int, stride: int) -> None:
    assert b"slices" in code_of(slices._kernel(warps, kind, columns, tokens, stride), arch)
