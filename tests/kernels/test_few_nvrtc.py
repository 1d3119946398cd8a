"""The kernels for few tokens: all their variants compile, without a GPU."""

import pytest
from golden.kernel_checks import compiled, needs_nvrtc

from minibble.runtime.kernels.linear4 import skinny, slices

SCALES = [(0, 64), (1, 64), (2, 128), (2, 64), (2, 32)]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "compute_80"])
@pytest.mark.parametrize(("kind", "columns"), SCALES)
@pytest.mark.parametrize("warps", skinny.WARPS)
def test_few_tokens(arch: str, kind: int, columns: int, warps: int) -> None:
    code = compiled(skinny._kernel(warps, kind, columns), arch)
    assert b"skinny" in code and (code[:4] == b"\x7fELF") == arch.startswith("sm_")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("warps", skinny.WARPS)
@pytest.mark.parametrize(("kind", "columns"), SCALES)
@pytest.mark.parametrize(("stride", "divided"), [(128, False), (256, True)])
def test_jobs(arch: str, warps: int, kind: int, columns: int, stride: int, divided: bool) -> None:
    """The smaller table; experts in part."""
    assert b"skinny" in compiled(skinny._kernel(warps, kind, columns, stride, divided), arch)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("warps", [12, 16])
@pytest.mark.parametrize(("kind", "columns"), SCALES)
@pytest.mark.parametrize(("tokens", "stride"), [(8, 256), (16, 128)])
def test_slices(arch: str, warps: int, kind: int, columns: int, tokens: int, stride: int) -> None:
    assert b"slices" in compiled(slices._kernel(warps, kind, columns, tokens, stride), arch)
