"""Hidden units that are computed elsewhere."""

import pytest
import torch
from golden.kernel_checks import interpreted


def check(device: str) -> None:
    from minibble.runtime.kernels.moe4.units import clear_after

    for F in (96, 1024, 2500):
        h = torch.full((5, F), float("nan"), device=device).bfloat16()
        units = torch.tensor([0, 1, F // 2, F - 1, F], dtype=torch.int32, device=device)
        clear_after(h, units)
        there = torch.arange(F, device=device) < units[:, None]
        assert h[there].isnan().all() and not h[~there].any()


def check_interpreted() -> None:
    check("cpu")


def test_interpreted() -> None:
    interpreted("test_units", "check_interpreted")


@pytest.mark.gpu
def test_cuda(cuda_device: torch.device) -> None:
    check("cuda")
