"""Reads ahead: the next tensor comes from disk while this one is worked on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in order; one thread works on the next item while the caller uses this one."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="read")
    waiting: tuple[Item, Future[Result]] | None = None
    try:
        for item in items:
            begun = (item, thread.submit(work, item))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = begun
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
