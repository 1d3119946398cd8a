"""Triton kernels that are set up on the GPU while the one ahead of them still runs (programmatic dependent launch).

A kernel launched so begins with `wait`: then all that came before is done and visible, as if nothing overlapped. Only
after that does it let the next one be set up, so no kernel runs ahead of more than one other.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """To be called before anything is read or written that another kernel may write or read."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """What to launch a kernel with that takes OVERLAP; Hopper is the first that can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
