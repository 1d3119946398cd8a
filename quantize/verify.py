"""Verifies a checkpoint from end to end: inventory, hashes, every value, and its distance from the source."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minibble.quantize.builtin import resolve_source
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import MinibbleError
from minibble.quantize.folder import MANIFEST
from minibble.quantize.inventory import TensorSpec
from minibble.quantize.job import Progress
from minibble.quantize.manifest import read_manifest
from minibble.quantize.measure import all_finite, relative_error
from minibble.quantize.nf4_math import decode_absmax
from minibble.quantize.prefetch import ahead
from minibble.quantize.tensors import QuantizedTensor
from minibble.quantize.writer import file_sha256

# NF4 of normally distributed weights has 0.0085, of uniform ones less; heavy tails raise it.
MAX_RELATIVE_ERROR = 0.02

Stored = Tensor | QuantizedTensor


@dataclass(frozen=True)
class VerifyResult:
    """`problems` is empty if all is well; `notes` are worth knowing but no faults."""

    ok: bool
    tensors: int
    problems: list[str]
    notes: list[str] = field(default_factory=list)


def verify_checkpoint(
    path: str | Path,
    against: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyResult:
    """Check the checkpoint at `path`, 16-bit or 4-bit, and collect every problem instead of stopping at the first.

    Inventory and headers, shard hashes against the manifest, every scale and weight finite and, given the 16-bit
    source `against`, the relative error of each 4-bit matrix and the identity of every kept tensor.
    """
    try:
        checkpoint = Checkpoint.open(resolve_source(path), strict=False)
        source = None if against is None else Checkpoint.open(resolve_source(against))
    except MinibbleError as error:
        return VerifyResult(False, 0, [str(error)])
    problems, notes = list(checkpoint.problems), []
    if source is not None:
        problems += _pairing_problems(checkpoint, source)
    sound = not problems
    notes += _check_manifest(checkpoint, problems)
    if sound:
        _check_tensors(checkpoint, source, problems, progress)
    else:
        notes.append("values were not checked: the tensors are not those of the model")
    return VerifyResult(not problems, len(checkpoint.inventory), problems, notes)


def _pairing_problems(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[str]:
    if source.format is not None:
        yield f"{source.path}: is 4-bit itself; compare against the 16-bit source"
    if source.inventory != checkpoint.inventory:
        yield f"{source.path}: is another model, its tensors differ from those of {checkpoint.path}"


def _check_manifest(checkpoint: Checkpoint, problems: list[str]) -> list[str]:
    """Size and SHA-256 of every shard against the manifest; returns notes."""
    try:
        manifest = read_manifest(checkpoint.path)
    except MinibbleError as error:
        problems.append(str(error))
        return []
    if manifest is None:
        return [f"there is no {MANIFEST}: the shards' hashes cannot be checked"]
    shards = manifest["shards"]
    names = {path.name for path in checkpoint.shards}
    for name in sorted(names ^ shards.keys()):
        problems.append(f"{name} is in only one of the index and {MANIFEST}")
    for path in checkpoint.shards:
        if path.name in shards and file_sha256(path) != shards[path.name]["sha256"]:
            problems.append(f"{path.name}: SHA-256 differs from {MANIFEST}: the file was changed or damaged")
    return []


def _check_tensors(
    checkpoint: Checkpoint,
    source: Checkpoint | None,
    problems: list[str],
    progress: Callable[[Progress], None] | None,
) -> None:
    def read(spec: TensorSpec) -> tuple[Stored, Tensor | None] | str:
        try:
            original = None if source is None else source.read(spec)
            assert not isinstance(original, QuantizedTensor)
            return checkpoint.read(spec), original
        except MinibbleError as error:
            return str(error)

    done, total = 0, checkpoint.total_nbytes
    for number, (spec, found) in enumerate(ahead(read, checkpoint.inventory), start=1):
        if isinstance(found, str):
            problems.append(found)
        else:
            problems += [f"{checkpoint.where(spec)}: {text}" for text in _faults(checkpoint, *found)]
        done += checkpoint.stored_nbytes(spec)
        if progress is not None:
            progress(Progress(done, total, number, len(checkpoint.inventory), spec.name))


def _faults(checkpoint: Checkpoint, stored: Stored, original: Tensor | None) -> Iterator[str]:
    if isinstance(stored, Tensor):
        if not all_finite(stored):
            yield "has NaN or infinite values"
        if original is not None and not _identical(stored, original):
            yield "differs from the source, though it is kept in 16 bit"
        return
    assert checkpoint.format is not None
    absmax = decode_absmax(stored)
    if not all_finite(absmax):
        yield "has NaN or infinite scales"
    elif original is not None:
        error = relative_error(checkpoint.format, original, stored)
        if not error <= MAX_RELATIVE_ERROR:
            yield f"relative error to the source is {error:.4g}, expected at most {MAX_RELATIVE_ERROR}"


def _identical(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits; unlike `torch.equal`, -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
