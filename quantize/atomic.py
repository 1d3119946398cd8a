"""Files that are either whole or absent: written beside their place, made durable, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minibble.quantize.errors import CheckpointError

_WRITE_CHUNK = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Whether `path` was left behind by a writer that was killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def write_atomic(path: Path, data: bytes) -> None:
    """`path` with the content `data`: after a crash it is there whole, or as it was before."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish(partial: Path, path: Path) -> None:
    """Rename the finished and synced file `partial` to `path`, durably."""
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, data: memoryview, position: int) -> None:
    """All of `data` into the file at `position`."""
    while data:
        count = os.pwrite(fd, data[:_WRITE_CHUNK], position)
        position += count
        data = data[count:]


@contextmanager
def disk_errors(where: Path, remedy: str) -> Iterator[None]:
    """Turn any OSError inside into a CheckpointError that names `where` and the `remedy`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be written ({error.strerror or error}); {remedy}") from error
