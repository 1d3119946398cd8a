"""One forward at a time through experts that share slots."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Turns:
    """What one thread requires must not be given up by another: they take turns, and so do their streams."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._ended: dict[torch.device, torch.cuda.Event] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has turns of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @contextmanager
    def take(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """While nobody else has one, after all that the one before issued to `devices`."""
        with self._lock:
            for device, event in self._ended.items():
                torch.cuda.current_stream(device).wait_event(event)
            try:
                yield
            finally:
                for device in devices:
                    if device.type == "cuda":
                        self._ended[device] = torch.cuda.Event()
                        self._ended[device].record(torch.cuda.current_stream(device))
