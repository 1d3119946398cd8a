"""What the manifest says about a 4-bit checkpoint's quality: errors, calibration, tokens per expert. Reads no weights.

`relative_error` is ||W - Q||^2 / ||W||^2; `output_error`, where there was a calibration, is
tr((W - Q) H (W - Q)^T) / tr(W H W^T) with H the sum of x x^T over the tokens that the matrix saw.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import CheckpointError
from minibble.quantize.folder import MANIFEST
from minibble.quantize.inventory import TensorSpec, inventory
from minibble.quantize.manifest import read_manifest

_MATRIX_ROLES = ("attention", "expert", "head", "embedding")
# Errors are shares, seldom above 1: what is larger than this is damage, and sums of it could overflow.
_LARGEST = 1e30


@dataclass(frozen=True)
class MatrixRecord:
    """One 4-bit matrix: its errors, the calibration tokens it saw, and what was done where they were too few."""

    spec: TensorSpec
    relative_error: float
    output_error: float | None = None
    tokens: int | None = None
    damp: float | None = None
    shrinkage: float | None = None
    fallback: str | None = None

    @property
    def matrix(self) -> str:
        """Its name within the layer or the expert: qkv_proj, w1, ..."""
        return self.spec.module_name.rpartition(".")[2]

    @property
    def place(self) -> str:
        """Where it is in the model, for people: layer 3, expert 2, w1."""
        parts = {"layer": self.spec.layer, "expert": self.spec.expert}
        return ", ".join([*(f"{k} {v}" for k, v in parts.items() if v is not None), self.matrix])


@dataclass(frozen=True)
class Calibration:
    """The text that a checkpoint was calibrated on: windows of `seq_len` tokens, `tokens` altogether."""

    text: str
    samples: int
    seq_len: int
    tokens: int
    seed: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Cell:
    """All matrices of one name in one layer: their mean error, None if none was measured, and the largest's record."""

    mean: float | None
    worst: MatrixRecord
    records: tuple[MatrixRecord, ...]


@dataclass(frozen=True)
class ExpertFeed:
    """Calibration tokens of one expert; `share` is relative to an even distribution over its layer's experts."""

    layer: int
    expert: int
    tokens: int
    share: float


@dataclass(frozen=True)
class Quality:
    """A checkpoint's quality; `records` in the inventory's order, `expert_tokens` [layers][experts]."""

    layers: int
    records: tuple[MatrixRecord, ...]
    settings: Mapping[str, Any]
    calibration: Calibration | None
    expert_tokens: tuple[tuple[int, ...], ...] | None

    @cached_property
    def measure(self) -> str:
        """The error that says most: output_error of a calibrated checkpoint, else relative_error."""
        measured = any(record.output_error is not None for record in self.records)
        return "output_error" if measured else "relative_error"

    def error(self, record: MatrixRecord) -> float | None:
        """The record's `measure`; None where calibration has not measured it."""
        error: float | None = getattr(record, self.measure)
        return error

    @property
    def mean_relative_error(self) -> float:
        return _mean(record.relative_error for record in self.records)

    @property
    def mean_output_error(self) -> float | None:
        """The mean of the matrices that have one; None where none has."""
        errors = [record.output_error for record in self.records if record.output_error is not None]
        return _mean(errors) if errors else None

    @property
    def worst(self) -> MatrixRecord:
        """The record with the largest `measure`."""
        return max(self.records, key=self._size)

    @property
    def outside(self) -> tuple[MatrixRecord, ...]:
        """The matrices that belong to no layer: embedding and head, if they are 4-bit too."""
        return tuple(record for record in self.records if record.spec.layer is None)

    @property
    def fallbacks(self) -> tuple[MatrixRecord, ...]:
        """The matrices that calibration had to leave to nearest rounding."""
        return tuple(record for record in self.records if record.fallback is not None)

    def by_matrix(self) -> dict[str, list[Cell | None]]:
        """Per name of a matrix a cell for each layer, None where the layer has no such 4-bit matrix.

        Attention first, and w2 after w1 and w3, whose outputs it reads.
        """
        rows: dict[tuple[bool, bool, str], dict[int, list[MatrixRecord]]] = {}
        for record in self.records:
            if record.spec.layer is not None:
                row = (record.spec.role == "expert", record.matrix == "w2", record.matrix)
                rows.setdefault(row, {}).setdefault(record.spec.layer, []).append(record)
        return {
            row[2]: [self._cell(rows[row][layer]) if layer in rows[row] else None for layer in range(self.layers)]
            for row in sorted(rows, key=lambda row: row[:2])
        }

    def feeds(self) -> list[ExpertFeed]:
        """Every expert's tokens, layer by layer; empty without a calibration."""
        return [
            ExpertFeed(layer, expert, tokens, tokens * len(row) / (sum(row) or 1))
            for layer, row in enumerate(self.expert_tokens or ())
            for expert, tokens in enumerate(row)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `by_matrix` are means per layer of `measure`, null where a layer has no such matrix."""
        return {
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "measure": self.measure,
            "mean_relative_error": self.mean_relative_error,
            "mean_output_error": self.mean_output_error,
            "by_matrix": {
                matrix: [None if cell is None else cell.mean for cell in cells]
                for matrix, cells in self.by_matrix().items()
            },
            "expert_tokens": None if self.expert_tokens is None else [list(row) for row in self.expert_tokens],
            "fallbacks": [record.spec.name for record in self.fallbacks],
        }

    def _size(self, record: MatrixRecord) -> float:
        return self.error(record) or 0.0

    def _cell(self, records: list[MatrixRecord]) -> Cell:
        errors = [error for record in records if (error := self.error(record)) is not None]
        return Cell(_mean(errors) if errors else None, max(records, key=self._size), tuple(records))


def read_quality(folder: Path, config: ModelConfig) -> Quality | None:
    """The quality of the 4-bit checkpoint in `folder`; None without a manifest or without a record of a matrix in it.

    CheckpointError if the manifest is damaged, lacks keys, or is of another model than `config`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    try:
        return _quality(manifest, config)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: {error}; quantize again, or remove the file for a report without errors per matrix"
        ) from error


def _quality(manifest: dict[str, Any], config: ModelConfig) -> Quality | None:
    quantized = _mapping(_get(manifest, "quantized", "the manifest"), "'quantized'")
    if not quantized:
        return None
    specs = {spec.name: spec for spec in inventory(config) if spec.role in _MATRIX_ROLES}
    unknown = quantized.keys() - specs
    if unknown:
        raise ValueError(f"{min(unknown)} is no matrix of the model that config.json describes")
    records = tuple(_record(spec, quantized[name]) for name, spec in specs.items() if name in quantized)
    calibration, tokens = manifest.get("calibration"), manifest.get("expert_tokens")
    if calibration is None and any(record.output_error is not None for record in records):
        raise ValueError("there are output errors, but no 'calibration' that they were measured on")
    settings = _mapping(_get(manifest, "settings", "the manifest"), "'settings'")
    return Quality(
        layers=config.num_hidden_layers,
        records=records,
        settings={_printable(k): _printable(v) if isinstance(v, str) else v for k, v in settings.items()},
        calibration=None if calibration is None else _calibration(calibration),
        expert_tokens=None if tokens is None else _expert_tokens(tokens, config),
    )


def _record(spec: TensorSpec, value: Any) -> MatrixRecord:
    entry = _mapping(value, spec.name)
    fallback = entry.get("fallback")
    return MatrixRecord(
        spec,
        relative_error=_number(_get(entry, "relative_error", spec.name), f"relative_error of {spec.name}"),
        output_error=_optional(entry, "output_error", spec.name),
        tokens=None if entry.get("tokens") is None else _whole(entry["tokens"], f"tokens of {spec.name}"),
        damp=_optional(entry, "damp", spec.name),
        shrinkage=_optional(entry, "shrinkage", spec.name) or None,
        fallback=None if fallback is None else _text(fallback, f"fallback of {spec.name}"),
    )


def _calibration(value: Any) -> Calibration:
    entry = _mapping(value, "'calibration'")
    samples, seq_len, tokens = (
        _whole(_get(entry, key, "'calibration'"), f"{key} of 'calibration'") for key in ("samples", "seq_len", "tokens")
    )
    text, seed, sha256 = _get(entry, "text", "'calibration'"), entry.get("seed"), entry.get("sha256")
    return Calibration(
        _text(text, "text of 'calibration'"),
        samples,
        seq_len,
        tokens,
        None if seed is None else _whole(seed, "seed of 'calibration'"),
        None if sha256 is None else _text(sha256, "sha256 of 'calibration'"),
    )


def _expert_tokens(value: Any, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    layers, experts = config.num_hidden_layers, config.num_experts
    rows = value if isinstance(value, list) else []
    if len(rows) != layers or any(not isinstance(row, list) or len(row) != experts for row in rows):
        raise ValueError(f"'expert_tokens' must have a count for each of {layers} layers × {experts} experts")
    return tuple(
        tuple(_whole(count, f"'expert_tokens' of layer {layer}, expert {expert}") for expert, count in enumerate(row))
        for layer, row in enumerate(rows)
    )


def _get(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise ValueError(f"{where} has no '{key}'")
    return entry[key]


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_shortly(value)}, expected an object")
    return value


def _optional(entry: Mapping[str, Any], key: str, name: str) -> float | None:
    return None if entry.get(key) is None else _number(entry[key], f"{key} of {name}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} is {_shortly(value)}, expected a number of at least 0")
    return float(value)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {_shortly(value)}, expected a whole number of at least 0")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_shortly(value)}, expected text")
    return _printable(value)


def _printable(value: str) -> str:
    """Without the control characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "�" for character in value)


def _shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _mean(values: Iterable[float]) -> float:
    """Rounded to 6 significant digits, like the manifest's own."""
    listed = list(values)
    return float(f"{sum(listed) / len(listed):.6g}")
