"""Verifies a checkpoint from end to end: inventory, hashes, every value, and its distance from the source."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

# The most that rounding to nearest may cost. Normal weights have 0.0085 in NF4 and 0.0102 in int4 with groups of 128,
# heavy tails (Student's t, 4 degrees of freedom) 0.028 in int4; another matrix's codes have 1 or more. Error feedback
# lets weights go for the sake of outputs, how far depends on the text: there only the manifest's figure can be held to.
MAX_RELATIVE_ERROR = 0.05
# How far an error may be from the manifest's: it was summed on another device, in another order.
RECORDED_TOLERANCE = 0.01

Stored = Tensor | QuantizedTensor


@dataclass(frozen=True)
class _Expected:
    """Relative errors by matrix as the manifest has them, and the most that any may be."""

    recorded: Mapping[str, float] = field(default_factory=dict)
    limit: float = MAX_RELATIVE_ERROR


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
    source `against`, the relative error of each 4-bit matrix, which must be the manifest's, and the identity of every
    kept tensor.
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
    expected, more_notes = _check_manifest(checkpoint, problems)
    notes += more_notes
    if sound:
        _check_tensors(checkpoint, source, expected, problems, progress)
    else:
        notes.append("values were not checked: the tensors are not those of the model")
    return VerifyResult(not problems, len(checkpoint.inventory), problems, notes)


def _pairing_problems(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[str]:
    if source.format is not None:
        yield f"{source.path}: is 4-bit itself; compare against the 16-bit source"
    if source.inventory != checkpoint.inventory:
        yield f"{source.path}: is another model, its tensors differ from those of {checkpoint.path}"


def _check_manifest(checkpoint: Checkpoint, problems: list[str]) -> tuple[_Expected, list[str]]:
    """Size and SHA-256 of every shard against the manifest; returns what it says of errors, and notes."""
    try:
        manifest = read_manifest(checkpoint.path)
    except MinibbleError as error:
        problems.append(str(error))
        return _Expected(), []
    if manifest is None:
        return _Expected(), [f"there is no {MANIFEST}: the shards' hashes cannot be checked"]
    shards = manifest["shards"]
    names = {path.name for path in checkpoint.shards}
    for name in sorted(names ^ shards.keys()):
        problems.append(f"{name} is in only one of the index and {MANIFEST}")
    for path in checkpoint.shards:
        if path.name in shards and file_sha256(path) != shards[path.name]["sha256"]:
            problems.append(f"{path.name}: SHA-256 differs from {MANIFEST}: the file was changed or damaged")
    return _Expected(_recorded(manifest), math.inf if "calibration" in manifest else MAX_RELATIVE_ERROR), []


def _recorded(manifest: dict[str, Any]) -> dict[str, float]:
    """The relative errors in a manifest, by matrix; what is no number is as good as not recorded."""
    records = manifest.get("quantized")
    pairs = records.items() if isinstance(records, dict) else ()
    errors = {name: record.get("relative_error") for name, record in pairs if isinstance(record, dict)}
    return {name: error for name, error in errors.items() if isinstance(error, int | float)}


def _check_tensors(
    checkpoint: Checkpoint,
    source: Checkpoint | None,
    expected: _Expected,
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
            faults = _faults(checkpoint, *found, expected.recorded.get(spec.name), expected.limit)
            problems += [f"{checkpoint.where(spec)}: {text}" for text in faults]
        done += checkpoint.stored_nbytes(spec)
        if progress is not None:
            progress(Progress(done, total, number, len(checkpoint.inventory), spec.name))


def _faults(
    checkpoint: Checkpoint, stored: Stored, original: Tensor | None, recorded: float | None, limit: float
) -> Iterator[str]:
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
        if not error <= limit:
            yield f"relative error to the source is {error:.4g}, expected at most {limit}"
        elif recorded is not None and not abs(error - recorded) <= RECORDED_TOLERANCE * recorded:
            yield f"relative error to the source is {error:.4g}, expected {recorded:.4g} as in {MANIFEST}"


def _identical(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits; unlike `torch.equal`, -0 is not 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
