"""A checkpoint on disk: opened once, checked against the inventory from headers alone, read tensor by tensor."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minibble.quantize import folder as files
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.formats import Format, format_of
from minibble.quantize.inventory import TensorSpec, inventory, quantized_roles
from minibble.quantize.names import canonical_name, fused_parts
from minibble.quantize.safetensors_file import TORCH_DTYPES, Header, TensorEntry, TensorReader, read_header
from minibble.quantize.tensors import QuantizedTensor

_FLOATS = {"BF16", "F16", "F32"}
_STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
_MAX_STATE_NBYTES = 4096
_SAMPLE_NBYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Location:
    """Where a stored tensor lies: its file, its name there, and its bytes."""

    path: Path
    raw_name: str
    entry: TensorEntry

    def __str__(self) -> str:
        return f"{self.path.name}: {self.raw_name}"


class Checkpoint:
    """A folder of safetensors shards holding every tensor of the inventory, in 16 bit or in a 4-bit format.

    Made by `Checkpoint.open`. `format` is None for a 16-bit checkpoint; `quantized` are the (canonical) names
    stored in 4 bit; `problems` is empty unless opened with `strict=False`. Safe to read from several threads.
    """

    def __init__(self, path: Path, config: ModelConfig, format: Format | None, headers: dict[Path, Header]):
        self.path, self.config, self.format = path, config, format
        self.inventory = inventory(config)
        self.specs: dict[str, TensorSpec] = {spec.name: spec for spec in self.inventory}
        self.quantized: frozenset[str] = frozenset()
        self.problems: list[str] = []
        self._headers = headers
        self._located: dict[str, Location] = {}
        self._reader = TensorReader()

    @classmethod
    def open(cls, path: str | Path, *, strict: bool = True) -> "Checkpoint":
        """Open the folder `path` and check everything but the tensors' values.

        Raises CheckpointError (or ConfigError) for anything missing, unknown, doubled or of another shape or
        dtype. With `strict=False` faults of single tensors are listed in `problems` instead.
        """
        path = Path(path)
        shards, weight_map = files.find_shards(path)
        config = ModelConfig.from_file(path / files.CONFIG)
        quantization = config.raw.get("quantization_config")
        format = None if quantization is None else format_of(quantization, str(path / files.CONFIG))
        checkpoint = cls(path, config, format, {shard: read_header(shard) for shard in shards.values()})
        checkpoint.problems += [] if weight_map is None else _index_problems(checkpoint._headers, weight_map)
        checkpoint._locate()
        checkpoint._match()
        if strict and checkpoint.problems:
            raise CheckpointError(_summary(path, checkpoint.problems))
        return checkpoint

    @property
    def shards(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(self._headers)

    @property
    def total_nbytes(self) -> int:
        """Bytes of all tensors of the model on disk, without headers."""
        return sum(self.stored_nbytes(spec) for spec in self.inventory)

    def stored_nbytes(self, spec: TensorSpec) -> int:
        """Bytes on disk of all stored tensors that carry `spec`: codes, scales, tables and JSON."""
        return sum(self._located[name].entry.nbytes for name in self._stored_names(spec))

    def dtype(self, spec: TensorSpec) -> torch.dtype:
        """The dtype in which `spec` is stored; that of its codes if it is 4-bit."""
        return TORCH_DTYPES[self._main(spec).entry.dtype]

    def where(self, spec: TensorSpec) -> str:
        """File and name of `spec`, for messages."""
        return str(self._main(spec))

    def read(self, spec: TensorSpec, pin_memory: bool = False) -> Tensor | QuantizedTensor:
        """The tensor of `spec` on the CPU: a Tensor in its stored dtype, or a QuantizedTensor if 4-bit."""
        if spec.name not in self.quantized:
            return self._read(spec.name, pin_memory)
        assert self.format is not None and len(spec.shape) == 2
        try:
            return self.format.unpack(
                spec.name, (spec.shape[0], spec.shape[1]), lambda name: self._read(name, pin_memory)
            )
        except CheckpointError as error:
            raise CheckpointError(f"{self._main(spec).path}: {error}") from error

    def fingerprint(self) -> str:
        """A digest of config, headers and samples of every shard's data: tells sources apart without reading all."""
        return self._fingerprint

    def extra_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config, licence: what a copy of the model must take along."""
        return files.extra_files(self.path)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256((self.path / files.CONFIG).read_bytes())
        for path, header in sorted(self._headers.items()):
            digest.update(f"{path.name}\0{header.file_nbytes}\0".encode() + header.raw)
            for start in (0, header.file_nbytes // 2, max(0, header.file_nbytes - _SAMPLE_NBYTES)):
                stop = min(header.file_nbytes, start + _SAMPLE_NBYTES)
                sample = self._reader.read(path, TensorEntry("U8", (stop - start,), start, stop))
                digest.update(sample.numpy())
        return digest.hexdigest()

    def _read(self, name: str, pin_memory: bool) -> Tensor:
        location = self._location(name)
        return self._reader.read(location.path, location.entry, pin_memory)

    def _location(self, name: str) -> Location:
        if name not in self._located:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self._located[name]

    def _main(self, spec: TensorSpec) -> Location:
        """Where `spec` is, or its codes if it is 4-bit."""
        if spec.name in self.quantized and self.format is not None:
            return self._location(self.format.codes_name(spec.name))
        return self._location(spec.name)

    def _stored_names(self, spec: TensorSpec) -> Iterator[str]:
        if spec.name in self.quantized and self.format is not None:
            return iter(self.format.stored(spec.name, spec.shape))
        return iter((spec.name,))

    def _locate(self) -> None:
        """Fill `_located` from the headers: canonical name -> place; a name met twice is a problem."""
        for path, header in self._headers.items():
            for raw_name, entry in header.entries.items():
                for name, part in _parts(self.config, path, raw_name, entry, self.problems):
                    if name in self._located:
                        first = self._located[name]
                        self.problems.append(f"{name} is there twice: in {first} and in {path.name}: {raw_name}")
                    self._located[name] = Location(path, raw_name, part)

    def _match(self) -> None:
        """Compare what is located with the inventory, both ways."""
        quantized: set[str] = set()
        used: set[str] = set()
        for spec in self.inventory:
            if self._has_codes(spec):
                quantized.add(spec.name)
                self.problems += self._quantized_problems(spec, used)
            else:
                used.add(spec.name)
                self.problems += self._plain_problems(spec)
        unknown = [location for name, location in self._located.items() if name not in used]
        self.problems += [f"{location} is unknown to this model" for location in unknown]
        self.quantized = frozenset(quantized)

    def _has_codes(self, spec: TensorSpec) -> bool:
        """Whether `spec` is stored in 4 bits; where codes have the matrix's own name, their dtype tells."""
        if self.format is None:
            return False
        name = self.format.codes_name(spec.name)
        return name in self._located and (name != spec.name or self._located[name].entry.dtype == "U8")

    def _quantized_problems(self, spec: TensorSpec, used: set[str]) -> Iterator[str]:
        """What is wrong with a 4-bit matrix; the names of its tensors are added to `used`."""
        assert self.format is not None
        main = self._located[self.format.codes_name(spec.name)]
        if spec.role in ("router", "norm"):
            used.add(self.format.codes_name(spec.name))
            yield f"{main} is 4-bit; routers and norms must stay in 16 bit"
            return
        try:
            stored = self.format.stored(spec.name, spec.shape)
        except ConfigError as error:
            yield f"{main}: {error}"
            return
        used.update(stored)
        for name, (dtype, shape) in stored.items():
            location = self._located.get(name)
            if location is None:
                yield f"tensor {name} is missing, part of the 4-bit matrix {spec.name}"
                continue
            found = location.entry
            if name.endswith(_STATE_SUFFIX) and found.dtype == "U8" and len(found.shape) == 1:
                # Other writers do not pad this JSON, so that its length varies.
                shape = (min(found.shape[0], _MAX_STATE_NBYTES),)
            if TORCH_DTYPES.get(found.dtype) != dtype or found.shape != shape:
                yield (
                    f"{location} is {found.dtype} {list(found.shape)}, "
                    f"expected {str(dtype).removeprefix('torch.')} {list(shape)}"
                )

    def _plain_problems(self, spec: TensorSpec) -> Iterator[str]:
        """What is wrong with a tensor that is not 4-bit, or not there."""
        must_be_4bit = self.format is not None and spec.role in quantized_roles()
        location = self._located.get(spec.name)
        if location is None:
            expected = self.format.codes_name(spec.name) if self.format is not None and must_be_4bit else spec.name
            yield f"tensor {expected} is missing"
        elif must_be_4bit:
            yield (
                f"{location} is {location.entry.dtype} in a checkpoint that claims 4 bit; every expert and attention "
                "matrix must be 4-bit: quantize the 16-bit source again with minibble"
            )
        elif location.entry.dtype not in _FLOATS or location.entry.shape != spec.shape:
            found = f"{location.entry.dtype} {list(location.entry.shape)}"
            yield f"{location} is {found}, expected {list(spec.shape)} in BF16, F16 or F32"


def _index_problems(headers: dict[Path, Header], weight_map: Mapping[str, str]) -> Iterator[str]:
    """The index against the headers, both ways; derived buffers do not matter."""
    by_file = {path.name: header.entries for path, header in headers.items()}
    for file, entries in by_file.items():
        for name in entries:
            if weight_map.get(name) != file and canonical_name(name) is not None:
                listed = weight_map.get(name)
                yield f"{file}: {name} is not in {files.INDEX}" + (f", which has it in {listed}" if listed else "")
    for name, file in weight_map.items():
        if name not in by_file[Path(file).name] and canonical_name(name) is not None:
            yield f"{files.INDEX} has {name} in {file}, where it is missing"


def _parts(
    config: ModelConfig, path: Path, raw_name: str, entry: TensorEntry, problems: list[str]
) -> Iterator[tuple[str, TensorEntry]]:
    """The canonical tensors inside one stored tensor: none for derived buffers, many for fused experts."""
    E, F, D = config.num_experts, config.intermediate_size, config.hidden_size
    fused = fused_parts(raw_name, E, F, D)
    if fused is None:
        name = canonical_name(raw_name)
        if name is not None:
            yield name, entry
        return
    rows, columns = max(part.stop for part in fused), F if fused[0].name.endswith(".w2.weight") else D
    if entry.shape != (E, rows, columns):
        problems.append(f"{path.name}: {raw_name} is {entry.dtype} {list(entry.shape)}, expected {[E, rows, columns]}")
        return
    row_nbytes = entry.nbytes // (E * rows)
    for part in fused:
        start = entry.start + (part.expert * rows + part.start) * row_nbytes
        stop = entry.start + (part.expert * rows + part.stop) * row_nbytes
        yield part.name, replace(entry, shape=(part.stop - part.start, columns), start=start, stop=stop)


def _summary(path: Path, problems: list[str]) -> str:
    """The first three problems and how many there are."""
    text = "; ".join(problems[:3])
    more = f"; and {len(problems) - 3} more problems" if len(problems) > 3 else ""
    return f"{path}: {text}{more}. Download the checkpoint again, or remove what does not belong to it"
