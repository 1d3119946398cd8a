"""What kernels keep on the device from one to the next: counters, for those whose last block finishes what all began.

A block that is done adds one; the block that brings the count to the number of blocks goes on alone and sets it back
to zero. So they are zero between kernels, and a replayed CUDA graph finds them as the captured one did.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

COUNT = 4096  # counters of one device and stream: a kernel may finish that many things at once

T = TypeVar("T")
Held = dict[tuple[torch.device, int | None], T]

_held: Held[Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 [COUNT], all zero; to be used by the current stream's next kernel, which leaves them zero."""
    return of_stream(_held, device, lambda: torch.zeros(COUNT, dtype=torch.int32, device=device))


def of_stream(held: Held[T], device: torch.device, make: Callable[[], T]) -> T:
    """What `held` has for the current stream, made on first use; kernels leave it as they find it.

    Kernels of different streams may run at once, so each stream has its own. All graphs captured on a device share
    one: they must not be replayed at the same time.
    """
    if device.type != "cuda":  # the interpreter's kernels run on the CPU, one after the other
        if (device, 0) not in held:
            held[device, 0] = make()
        return held[device, 0]
    if torch.cuda.is_current_stream_capturing():
        # Nothing that lives on may be allocated now. Only without a warm-up is there none: then it belongs to the
        # graph, which makes it anew at each replay, so that no kernel begins before the one ahead has ended.
        shared = held.get((device, None))
        return make() if shared is None else shared
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in held:
        with torch.inference_mode(False):
            for new in (key, (device, None)):
                if new not in held:
                    held[new] = make()
        torch.cuda.current_stream(device).synchronize()  # a graph may be replayed on another stream
    return held[key]
