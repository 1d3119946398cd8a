"""Records in a file: read past the page cache, several pieces at a time, each piece with a checksum.

Reading is bound by the disk at 2 GB/s or so; a thread's crc32 does 3.8 GB/s, so everything read is checked.
"""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from minibble.quantize import sizes
from minibble.quantize.errors import CheckpointError
from minibble.runtime.experts.tiering import Key

log = logging.getLogger(__name__)

PAGE = 4096  # what direct reads and writes are aligned to, in the file and in memory
PIECE_NBYTES = 4 << 20  # of one read
THREADS = 16  # reading at a time, 1.7 to 1.9 GB/s on a disk that has 1.9; 4 of them with 8 MiB each gave 1.55
_MARGIN_NBYTES = 64 << 20
_PREFIX, _SUFFIX = "minibble-experts-", ".bin"


class DiskRecords:
    """A file of records in `folder`, one for each of `keys`, that lives no longer than this object.

    Buffers are uint8 of `stride` bytes on page boundaries. CheckpointError where the disk is too small, fails, or
    does not give back what was written.
    """

    def __init__(self, folder: Path, record_nbytes: int, keys: Sequence[Key]):
        self.stride = -(-record_nbytes // PAGE) * PAGE
        self.index = {key: place for place, key in enumerate(keys)}
        self.buffered = 0  # pieces that went through the page cache, since direct access was refused
        self._lock = threading.Lock()
        self._sums: dict[int, int] = {}  # checksum by position in the file
        self._seal: tuple[int, ...] | None = None
        try:
            _remove_stale(folder)
            self._fd, self.path = _create(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no file for experts can be made here ({error.strerror}); choose another folder"
            ) from error
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="experts")
        self._remove = weakref.finalize(self, _close, self._pool, self._fd, self.path)
        try:
            self._reserve(folder)
            self.direct = self._try_direct()
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return len(self.index) * self.stride

    def write(self, key: Key, buffer: Tensor, first: Callable[[], None], work: "list[Future[None]]") -> None:
        """Begin to write a record once `first`, which every piece calls, has returned.

        To `work` are added futures that raise CheckpointError; the buffer must not be touched before they end.
        """
        self._pieces(key, buffer, self._write_piece, first, work)

    def read(self, key: Key, buffer: Tensor, work: "list[Future[None]]") -> None:
        """Begin to read a record into `buffer`, as `write` does."""
        self._pieces(key, buffer, self._read_piece, lambda: self._check_unchanged(key), work)

    def seal(self) -> None:
        """Note how the file looks after the last write; from now on it must not change."""
        try:
            os.fsync(self._fd)
            self._seal = _identity(os.stat(self.path))
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: experts could not all be written ({error.strerror}); check the disk and load again"
            ) from error

    def close(self) -> None:
        """Wait for what is under way, and remove the file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._remove()

    def _reserve(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if free < self.nbytes + _MARGIN_NBYTES:
            raise CheckpointError(
                f"{folder}: {sizes.decimal(free)} are free on this disk, {len(self.index)} experts need "
                f"{sizes.decimal(self.nbytes)}; make room or choose another folder"
            )
        try:
            os.posix_fallocate(self._fd, 0, self.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise CheckpointError(
                    f"{self.path}: {sizes.decimal(self.nbytes)} cannot be had ({error.strerror}); "
                    "make room or choose another folder"
                ) from error
            os.truncate(self._fd, self.nbytes)

    def _try_direct(self) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            self._warn_indirect(error)
            return False
        return True

    def _go_buffered(self, error: OSError) -> None:
        with self._lock:
            if self.direct:
                self.direct = False
                fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                self._warn_indirect(error)

    def _warn_indirect(self, error: OSError) -> None:
        warnings.warn(
            f"{self.path}: direct access is refused ({error.strerror}); experts are read through the page cache",
            stacklevel=2,
        )

    def _pieces(
        self,
        key: Key,
        buffer: Tensor,
        move: Callable[[Key, memoryview, int], None],
        first: Callable[[], None],
        work: "list[Future[None]]",
    ) -> None:
        data, start = memoryview(buffer.numpy()), self.index[key] * self.stride

        def piece(place: int) -> None:
            first()
            try:
                move(key, data[place : min(place + PIECE_NBYTES, self.stride)], start + place)
            except OSError as error:
                raise self._error(key, error.strerror or str(error)) from error

        for place in range(0, self.stride, PIECE_NBYTES):
            work.append(self._pool.submit(piece, place))

    def _write_piece(self, key: Key, data: memoryview, position: int) -> None:
        self._sums[position] = zlib.crc32(data)
        done = 0
        while done < len(data):
            done += self._move(os.pwritev, data[done:], position + done, key)

    def _read_piece(self, key: Key, data: memoryview, position: int) -> None:
        done = 0
        while done < len(data):
            done += self._move(os.preadv, data[done:], position + done, key)
        if zlib.crc32(data) != self._sums[position]:
            raise self._error(key, "its checksum is not that of what was written")

    def _move(
        self, call: Callable[[int, list[memoryview], int], int], data: memoryview, position: int, key: Key
    ) -> int:
        """Bytes moved, whole pages; on refusal of direct access the file goes on without."""
        try:
            count = call(self._fd, [data], position)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._go_buffered(error)
            count = call(self._fd, [data], position)
        if not self.direct:
            with self._lock:
                self.buffered += 1
        if count < min(PAGE, len(data)):
            raise self._error(key, f"{count} of {len(data)} bytes at {position} were moved")
        return count // PAGE * PAGE

    def _check_unchanged(self, key: Key) -> None:
        if self._seal is None:
            return
        try:
            found = _identity(os.stat(self.path))
        except OSError as error:
            raise self._error(key, error.strerror or str(error)) from error
        if found != self._seal:
            raise self._error(key, "the file has been changed or replaced")

    def _error(self, key: Key, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: expert {key[1]} of layer {key[0]}: {reason}; check the disk, leave the file alone, "
            "and load the model again if this goes on"
        )


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _create(folder: Path) -> tuple[int, Path]:
    """A new file, locked as long as it is open, so that others know it is in use."""
    while True:
        fd, name = tempfile.mkstemp(_SUFFIX, _PREFIX, folder)
        with suppress(OSError):  # some network file systems have no locks; then nobody removes it as stale, either
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(name):  # else another process found it without a lock
            return fd, Path(name)
        os.close(fd)


def _remove_stale(folder: Path) -> None:
    """Remove the files of processes that were killed: nobody holds their locks."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), open(path, "rb") as file:  # in use, or another's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            log.info("%s: removed, the process that made it is gone", path)


def _close(pool: ThreadPoolExecutor, fd: int, path: Path) -> None:
    # Work under way keeps the records alive, so there is none; a thread of the pool may be the one that comes here.
    pool.shutdown(wait=False)
    ours = os.fstat(fd)
    os.close(fd)
    with suppress(FileNotFoundError):
        if os.path.samestat(ours, os.stat(path)):
            path.unlink()
