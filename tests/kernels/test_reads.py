"""Counts of experts that a step reads from the device and from host memory."""

import pytest
import torch
from golden.kernel_checks import interpreted


def check(device: str) -> None:
    from minibble.runtime.kernels.moe4.reads import count_reads

    generator = torch.Generator().manual_seed(0)
    far = torch.randint(2, (32,), generator=generator).to(torch.uint8)
    counts, near_seen, far_seen = torch.zeros(2, dtype=torch.int64, device=device), 0, 0
    for M in (1, 2, 3, 16, 64):
        ids = torch.randint(32, (M, 2), generator=generator, dtype=torch.int32)
        count_reads(ids.to(device), far.to(device), counts)
        chosen = set(ids.flatten().tolist())
        far_seen += sum(int(far[expert]) for expert in chosen)
        near_seen += sum(1 - int(far[expert]) for expert in chosen)
        assert counts.tolist() == [near_seen, far_seen]


def check_interpreted() -> None:
    check("cpu")


def test_interpreted() -> None:
    interpreted("test_reads", "check_interpreted")


@pytest.mark.gpu
def test_cuda(cuda_device: torch.device) -> None:
    check("cuda")
