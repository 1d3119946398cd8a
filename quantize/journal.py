"""The journal of an unfinished checkpoint: what it is made from, and which shards are whole.

JSON lines, each made durable before work goes on. The first says what the output is made from; each further one
records a finished shard. A last line torn by a crash is ignored: its shard is written again.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minibble.quantize.atomic import write_atomic
from minibble.quantize.errors import CheckpointError

VERSION = 1


@dataclass(frozen=True)
class SealedShard:
    """A shard that is whole on disk; `tensors` holds what the manifest tells about each of its matrices."""

    filename: str
    nbytes: int
    sha256: str
    tensors: dict[str, Any]


def create_journal(path: Path, identity: dict[str, Any]) -> None:
    """A new journal of an output made from `identity`: source fingerprint, settings, version."""
    write_atomic(path, _line({"journal": VERSION, "identity": identity}))


def append_journal(path: Path, shard: SealedShard) -> None:
    """Record `shard`, durably; the shard itself must be durable already."""
    with open(path, "ab") as file:
        file.write(_line(asdict(shard)))
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: Path) -> tuple[dict[str, Any], dict[str, SealedShard]]:
    """Identity and finished shards by file name; a torn last line is cut off the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        first, *rest = [json.loads(line) for line in whole.splitlines()]
        if first["journal"] != VERSION:
            raise ValueError(f"journal version {first['journal']}, expected {VERSION}")
        shards = [SealedShard(**line) for line in rest]
        identity = first["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no journal of this program ({error}); remove the folder") from error
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    return identity, {shard.filename: shard for shard in shards}


def differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two identities differ, one text a key."""
    texts = []
    for key in sorted(found.keys() | expected.keys()):
        left, right = found.get(key), expected.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            texts += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            texts.append(f"{prefix}{key} was {left!r}, now {right!r}")
    return texts


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
