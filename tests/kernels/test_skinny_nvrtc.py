"""The kernel for few tokens with 16 of them at once, the smaller table, experts in part: it compiles, without a GPU."""

import pytest

from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.linear4 import skinny


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("warps", skinny.WARPS)
@pytest.mark.parametrize(("kind", "columns"), [(0, 64), (1, 64), (2, 128), (2, 32)])
@pytest.mark.parametrize(
    ("tokens", "stride", "divided"), [(16, 256, False), (16, 128, False), (8, 128, False), (8, 256, True)]
)
def test_variants(arch: str, warps: int, kind: int, columns: int, tokens: int, stride: int, divided: bool) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="no NVRTC", exc_type=ImportError)
    kernel = skinny._kernel(warps, kind, columns, tokens, stride, divided)
    text = "\n".join(path.read_text() for path in kernel.sources)
    assert b"skinny" in nvrtc._compile(text, kernel.sources[-1].name, kernel.macros, arch)
