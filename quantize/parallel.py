"""Independent pieces of a tensor's work, spread over the CPU's threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def spread(work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device) -> list[Result]:
    """`work` on each of `pieces`, in order; on the CPU several pieces at once, each on one thread.

    torch's own threads meet after every operation, which costs more than they save on pieces that fit a cache; and
    some of its loops (index_select among them) are serial.
    """
    if device.type != "cpu":
        return [work(piece) for piece in pieces]
    inferring = torch.is_inference_mode_enabled()  # which threads do not take over by themselves

    def in_same_mode(piece: Piece) -> Result:
        with torch.inference_mode(inferring):
            return work(piece)

    with _one_thread_each() as threads:
        if threads == 1 or len(pieces) == 1:
            return [work(piece) for piece in pieces]
        return list(_pool(threads).map(in_same_mode, pieces))


@contextmanager
def _one_thread_each() -> Iterator[int]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "spread", initializer=torch.set_num_threads, initargs=(1,))
