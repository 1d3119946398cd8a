"""The safetensors file format: headers read with suspicion, headers written canonically, data read by range.

A file is 8 bytes of header length (little endian), a JSON header and the tensors' bytes without gaps. The format
carries no checksum, and a header comes from strangers: every number in it is checked against the file itself.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.errors import CheckpointError

MAX_HEADER_NBYTES = 100_000_000  # the safetensors library's own limit
METADATA = {"format": "pt"}

# In the order in which the safetensors library lays tensors out: descending, then by name.
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64",
    "F64", "I64", "U64",
)  # fmt: skip
_RANK = {code: rank for rank, code in enumerate(_ORDER)}
_ITEMSIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
}
_ITEMSIZE |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8}
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_LARGEST = 2**63 - 1
_READ_CHUNK = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: safetensors' dtype code, shape, and its bytes `[start, stop)` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors by name, the length of the file, and a digest's worth of raw bytes."""

    entries: dict[str, TensorEntry]
    raw: bytes
    file_nbytes: int


def read_header(path: Path) -> Header:
    """The header of `path`, checked: CheckpointError naming the file for anything not exactly as it must be."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_NBYTES):
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes in a file of {size} (limit {MAX_HEADER_NBYTES}); "
                    "the file is truncated or no safetensors file: download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    header = _parse(path, raw)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_coverage(path, entries, 8 + length, size)
    return Header(entries, raw, size)


def encode_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Header bytes and each tensor's offset in the file, as `safetensors.torch.save_file` lays them out."""
    coded = {name: (_CODES[dtype], shape) for name, (dtype, shape) in tensors.items()}
    order = sorted(coded, key=lambda name: (-_RANK[coded[name][0]], name.encode()))
    header: dict[str, Any] = {"__metadata__": METADATA}
    position = 0
    starts = {}
    for name in order:
        code, shape = coded[name]
        nbytes = _ITEMSIZE[code] * prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        starts[name] = position
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + start for name, start in starts.items()}


class TensorReader:
    """Reads tensors by range with at most `max_open` files open; safe to share between threads."""

    def __init__(self, max_open: int = 16):
        self._open = lru_cache(maxsize=max_open)(_OpenFile)

    def read(self, path: Path, entry: TensorEntry, pin_memory: bool = False) -> Tensor:
        """The tensor of `entry` in `path`, on the CPU, in its stored dtype.

        Ranges are read, not mapped: a file cut short while in use is an error, not a killed process.
        """
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{path}: dtype {entry.dtype} is not supported")
        data = torch.empty(entry.nbytes, dtype=torch.uint8, pin_memory=pin_memory)
        self._open(path).read_into(memoryview(data.numpy()), entry.start)
        return data.view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


class _OpenFile:
    """A file open for reading, closed when its last user lets go of it."""

    def __init__(self, path: Path):
        self.path, self.fd = path, -1
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error

    def read_into(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done : done + _READ_CHUNK]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
            if count == 0:
                raise CheckpointError(f"{self.path}: ends at byte {start + done}, was cut short while in use")
            done += count

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); download it again") from error
    if not raw.startswith(b"{") or not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object; this is no safetensors file")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name}: malformed header entry {value!r:.200}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
        raise CheckpointError(f"{path}: {name}: unknown dtype {dtype!r:.40}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name}: malformed shape {shape!r:.80} or data_offsets {offsets!r:.80}")
    nbytes = prod(shape) * _ITEMSIZE[dtype]
    if nbytes > _LARGEST or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{path}: {name}: data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, "
            f"but {dtype} {shape} needs {nbytes}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)


def _check_coverage(path: Path, entries: dict[str, TensorEntry], position: int, size: int) -> None:
    """The tensors must fill the file from the header to its end, without gap or overlap."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name}: starts at byte {entry.start}, expected {position}: {problem}")
        position = entry.stop
    if position != size:
        problem = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(
            f"{path}: the file has {size} bytes, expected {position}: it is {problem}; download or write it again"
        )
