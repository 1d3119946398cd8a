"""Calibration texts: writing and reading them, and how they are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden.byte_tokenizer import byte_tokenizer, save_byte_tokenizer

from minibble.calibrate.text import CalibrationText, read_calibration
from minibble.quantize.errors import MinibbleError

LINE = "The quick brown fox jumps over the lazy dog; ümläute count as several bytes.\r\n"
Write = Callable[..., Path]


def with_template(checkpoint: Path, folder: Path, template: str | None) -> Path:
    shutil.copytree(checkpoint, folder)
    save_byte_tokenizer(folder, template)
    return folder


def jsonl(*documents: object) -> str:
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


def ids_of(content: str) -> list[int]:
    return list(byte_tokenizer()(content, add_special_tokens=False)["input_ids"])


def stream(found: CalibrationText) -> list[int]:
    return found.ids.flatten().tolist()


def refusal(kind: type[MinibbleError], source: Any, checkpoint: Path, **settings: Any) -> str:
    """The message with which `source` is refused, checked to be one line."""
    with pytest.raises(kind) as caught:
        read_calibration(source, checkpoint, **({"seq_len": 8} | settings))
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and len(message) < 500, message
    return message


class Endless:
    """A stream that never ends, and counts what it gave."""

    def __init__(self, unit: bytes):
        self.unit, self.given = unit, 0

    def read(self, size: int) -> bytes:
        start = self.given % len(self.unit)
        self.given += size
        return (self.unit * (size // len(self.unit) + 2))[start : start + size]

    def readline(self, size: int) -> bytes:
        whole = self.unit * 1000 if b"\n" not in self.unit else self.unit
        start = self.given % len(self.unit)
        line = whole[start:].split(b"\n")[0] + (b"\n" if b"\n" in whole else b"")
        self.given += len(line[:size])
        return line[:size]
