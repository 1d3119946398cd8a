"""Layers on several devices: what goes from one to the next, one process issuing to all.

Nothing here waits on the host, so while one device has a piece of a prompt, the device before has the next piece.
docs/adr/0012-pipeline.md says why layers are divided and not matrices or experts.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor


def hop(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, there for what is issued on its current stream from now on.

    Between GPUs the copy has streams of its own: torch's would also wait for all that the receiving device has still
    to do, and so hold the sending one back.
    """
    if x.device == device:
        return x
    if x.device.type != "cuda" or device.type != "cuda":
        return x.to(device)
    here, there = _stream(x.device, "sends"), _stream(device, "receives")
    here.wait_stream(torch.cuda.current_stream(x.device))
    receiving = torch.cuda.current_stream(device)
    with torch.cuda.stream(there), torch.cuda.stream(here):
        y = x.to(device, non_blocking=True)
    x.record_stream(here)
    y.record_stream(receiving)
    receiving.wait_stream(there)
    return y


class Pause(Protocol):
    """What has to happen between two stretches of a decode step, or beside one; what follows is on `device`."""

    device: torch.device
    ends: bool  # whether the stretch ends here; if not, its graph goes on while the host does this

    def prepare(self) -> None:
        """Make what the next stretch refers to, before that is captured."""

    def run(self) -> None:
        """Do it, after the first stretch has been issued and before the second is."""


class Hop:
    """A pause of a decode step in which `x` goes to `device`, always to the same place, `arrived`.

    Both devices' current streams take part, so that a graph's replay on one is followed by one on the other.
    """

    ends = True

    def __init__(self, x: Tensor, device: torch.device):
        self.x, self.device = x, device
        self._place: Tensor | None = None

    @property
    def arrived(self) -> Tensor:
        """What the next stretch reads."""
        assert self._place is not None, "a pause that has been neither prepared nor run"
        return self._place

    def prepare(self) -> None:
        """Make the place that the copy goes to."""
        if self._place is None:
            self._place = torch.empty_like(self.x, device=self.device)

    def run(self) -> None:
        """Issue the copy."""
        self.prepare()
        self.arrived.copy_(self.x, non_blocking=True)


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One for each: a GPU in the middle receives a piece while it still works on the one that it will send."""
    return torch.cuda.Stream(device)
