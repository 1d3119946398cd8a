"""Counters on the device for kernels whose last block finishes what all of them began.

A block that is done adds one; the block that brings the count to the number of blocks goes on alone and sets it back
to zero. So they are zero between kernels, and a replayed CUDA graph finds them as the captured one did.
"""

import torch
from torch import Tensor

COUNT = 4096  # counters of one device and stream: a kernel may finish that many things at once

_held: dict[tuple[torch.device, int | None], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 [COUNT], all zero; to be used by the current stream's next kernel, which leaves them zero.

    Kernels of different streams may run at once, so each stream has its own. All graphs captured on a device share
    one set: they must not be replayed at the same time.
    """
    if device.type != "cuda":  # the interpreter's kernels run on the CPU, one after the other
        return _held.setdefault((device, 0), torch.zeros(COUNT, dtype=torch.int32, device=device))
    if torch.cuda.is_current_stream_capturing():
        # Nothing that lives on may be allocated now. Only without a warm-up are there none: then they belong to the
        # graph, which zeroes them at each replay.
        held = _held.get((device, None))
        return torch.zeros(COUNT, dtype=torch.int32, device=device) if held is None else held
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _held:
        with torch.inference_mode(False):
            for new in (key, (device, None)):
                _held.setdefault(new, torch.zeros(COUNT, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()  # a graph may be replayed on another stream
    return _held[key]
