"""Makes the oracles of `tests/golden` importable as `golden`; what a calibration text is read from."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    """A folder with all that reading a text needs: a tokenizer of single bytes, and a config."""
    from golden.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(tiny_config(vocab_size=VOCAB_SIZE)))
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Factory `write(content, name="t.txt")`: a file of text or bytes."""

    def file(content: str | bytes, name: str = "t.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file
