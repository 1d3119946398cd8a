"""Writes a checkpoint so that a crash at any point loses at most the shard being written.

Each shard goes to a temporary file, tensor by tensor at its final offset; a background thread then hashes, syncs,
renames and journals it while the next one is produced. The index comes last: a folder with an index is whole.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from minibble.quantize import sizes
from minibble.quantize.atomic import (
    disk_errors,
    is_partial,
    partial_path,
    publish,
    sync_folder,
    write_at,
    write_atomic,
)
from minibble.quantize.errors import CheckpointError
from minibble.quantize.folder import CONFIG, INDEX, JOURNAL, MANIFEST
from minibble.quantize.journal import (
    SealedShard,
    append_journal,
    create_journal,
    differences,
    read_journal,
)
from minibble.quantize.shards import ShardPlan

_MARGIN_NBYTES = 64 << 20  # config, manifest, index, tokenizer; and what the file system itself needs


class Produced(NamedTuple):
    """What is stored for one spec: its tensors (on the CPU), and what the manifest tells about it."""

    name: str
    tensors: dict[str, Tensor]
    record: Any = None


class CheckpointWriter:
    """Context manager that writes the planned `shards` into the folder `out`.

    `identity` is what the output depends on (source fingerprint, settings, version), as JSON values. With `resume`
    an unfinished output of the same identity is continued; `pending` lists what is still to be written, and
    `complete` says that nothing is. On any error the temporary file is removed and finished shards are kept.
    """

    def __init__(self, out: Path, shards: Sequence[ShardPlan], identity: dict[str, Any], resume: bool = False):
        self.out, self.shards, self.identity = out, tuple(shards), identity
        self.complete = False
        self.sealed: dict[str, SealedShard] = {}
        self._resume = resume
        self._sealing: Future[SealedShard] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._lock = -1

    @property
    def pending(self) -> list[ShardPlan]:
        """The shards still to be written, in order."""
        return [shard for shard in self.shards if shard.filename not in self.sealed]

    def __enter__(self) -> Self:
        try:
            with disk_errors(self.out, "choose another output folder"):
                self.out.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._release()

    def write_shard(self, shard: ShardPlan, produced: Iterable[Produced]) -> None:
        """Write `shard` from what `produced` yields, in any order; it is sealed in the background."""
        path = self.out / shard.filename
        partial = partial_path(path)
        try:
            with disk_errors(path, self._keep_text()):
                records = _write_tensors(partial, shard, produced)
            self.wait()
            self._sealing = self._thread.submit(self._seal, path, records)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def wait(self) -> None:
        """Block until every shard handed over is whole on disk; its error, if it had one, is raised here."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            shard = sealing.result()
            self.sealed[shard.filename] = shard

    def finish(
        self,
        config: dict[str, Any],
        manifest: dict[str, Any],
        extra: Iterable[Path],
        extra_json: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    ) -> None:
        """Write all that is no shard: `extra` files are copied, `extra_json` (content by file name) written, then
        config, manifest and, last, the index."""
        self.wait()
        assert not self.pending
        weight_map = {name: shard.filename for shard in self.shards for name in shard.tensors}
        total = sum(shard.tensor_nbytes for shard in self.shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with disk_errors(self.out, self._keep_text()):
            for path in extra:
                write_atomic(self.out / path.name, path.read_bytes())
            for name, content in extra_json.items():
                write_atomic(self.out / name, json_bytes(content))
            write_atomic(self.out / CONFIG, json_bytes(config))
            write_atomic(self.out / MANIFEST, json_bytes(manifest, sort_keys=True))
            write_atomic(self.out / INDEX, json_bytes(index))
            (self.out / JOURNAL).unlink()
            sync_folder(self.out)

    def _take_lock(self) -> None:
        self._lock = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{self.out}: another process is writing here; wait for it") from error
        except OSError:
            # Some network file systems have no locks on folders; the lock only guards against mistakes.
            pass

    def _begin(self) -> None:
        journal = self.out / JOURNAL
        found = [path for path in self.out.iterdir() if not is_partial(path)]
        finished = (self.out / INDEX).exists() and (self.out / MANIFEST).exists()
        if journal.exists() and self._resume:
            identity, sealed = read_journal(journal)
            self._check_identity(identity)
            self.sealed = {name: shard for name, shard in sealed.items() if self._is_intact(shard)}
        elif finished and self._resume:
            self._check_identity(json.loads((self.out / MANIFEST).read_bytes()))
            self.complete = True
            return
        elif found:
            remedy = "continue it with --resume or remove it" if journal.exists() else "choose an empty folder"
            raise CheckpointError(f"{self.out}: the output folder is not empty ({found[0].name}); {remedy}")
        for path in self.out.iterdir():
            if is_partial(path):
                path.unlink()
        self._check_disk()
        if not journal.exists():
            create_journal(journal, self.identity)

    def _check_identity(self, found: dict[str, Any]) -> None:
        changed = differences({key: found.get(key) for key in self.identity}, self.identity)
        if changed:
            raise CheckpointError(
                f"{self.out}: was begun differently: {'; '.join(changed)}; "
                "resume with the same source, settings and version, or choose an empty folder"
            )

    def _is_intact(self, shard: SealedShard) -> bool:
        path = self.out / shard.filename
        planned = {plan.filename: plan for plan in self.shards}
        return (
            shard.filename in planned
            and path.is_file()
            and path.stat().st_size == shard.nbytes == planned[shard.filename].nbytes
            and file_sha256(path) == shard.sha256
        )

    def _check_disk(self) -> None:
        needed = sum(shard.nbytes for shard in self.pending) + _MARGIN_NBYTES
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise CheckpointError(
                f"{self.out}: {sizes.decimal(free)} are free on this disk, {sizes.decimal(needed)} are needed; "
                "make room or choose another disk"
            )

    def _seal(self, path: Path, records: dict[str, Any]) -> SealedShard:
        partial = partial_path(path)
        try:
            with disk_errors(path, self._keep_text()):
                digest = file_sha256(partial)
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                    size = os.fstat(file.fileno()).st_size
                publish(partial, path)
                shard = SealedShard(path.name, size, digest, records)
                append_journal(self.out / JOURNAL, shard)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return shard

    def _keep_text(self) -> str:
        return (
            f"{len(self.sealed)} of {len(self.shards)} shards are finished and kept: "
            "make room on the disk and continue with --resume"
        )

    def _release(self) -> None:
        """Let a shard that is being sealed become whole, then let go of thread and lock."""
        self._thread.shutdown(wait=True)
        if self._lock >= 0:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = -1


def file_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: dict[str, Any], sort_keys: bool = False) -> bytes:
    """`value` as the text of a JSON file."""
    return json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False).encode() + b"\n"


def _write_tensors(partial: Path, shard: ShardPlan, produced: Iterable[Produced]) -> dict[str, Any]:
    """The file `partial`, filled; returns the records of its specs."""
    header, starts = shard.header
    missing = set(shard.tensors)
    records = {}
    with open(partial, "wb", buffering=0) as file:
        file.truncate(shard.nbytes)
        write_at(file.fileno(), memoryview(header), 0)
        for name, tensors, record in produced:
            for key, tensor in tensors.items():
                assert shard.tensors[key] == (tensor.dtype, tuple(tensor.shape)), f"{key} is not as planned"
                write_at(file.fileno(), _bytes(tensor), starts[key])
                missing.remove(key)
            if record is not None:
                records[name] = record
    assert not missing, f"{shard.filename}: {len(missing)} planned tensors were not produced"
    return records


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
