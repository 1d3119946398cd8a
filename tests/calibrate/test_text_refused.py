"""Calibration text: one clear line for everything that cannot be used."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from golden.byte_tokenizer import TEMPLATE
from golden.calibration_text import LINE, Write, jsonl, refusal, with_template

from minibble.calibrate import text
from minibble.quantize.errors import CalibrationError, CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_len": 1}, "1 tokens"),
        ({"samples": 0}, "0 samples"),
        ({"samples": -2}, "-2 samples"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_settings(checkpoint: Path, settings: dict[str, int], words: str) -> None:
    assert words in refusal(ConfigError, "demo", checkpoint, **settings)


@pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_empty_text(checkpoint: Path, write: Write, content: str, name: str) -> None:
    assert f"{name}: holds no text" in refusal(CalibrationError, write(content, name), checkpoint)


def test_empty_documents(checkpoint: Path, write: Write) -> None:
    path = write(jsonl({"text": ""}, {"text": " "}), "t.jsonl")
    assert "holds no text" in refusal(CalibrationError, path, checkpoint)
    assert "standard input: holds no text" in refusal(CalibrationError, "-", checkpoint, stdin=io.BytesIO())


def test_too_short_a_text(checkpoint: Path, write: Write) -> None:
    path = write("x" * 30)
    message = refusal(CalibrationError, path, checkpoint, seq_len=31)
    assert "t.txt: 30 tokens, but 1 x 31 need 31: give more text or take a shorter --seq-len" in message
    message = refusal(CalibrationError, path, checkpoint, samples=5)
    assert "30 tokens, but 5 x 8 need 40: give more text or take --samples 3 or take a shorter --seq-len" in message


def test_too_few_tokens_before_the_limit(checkpoint: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_ALWAYS_BYTES", 100)
    monkeypatch.setattr(text, "_MOST_BYTES", 100)
    message = refusal(CalibrationError, write("x" * 200), checkpoint, samples=20)
    assert "100 tokens in its first 100 bytes" in message and "more text" not in message
    assert "--samples 12" in message


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"fine so far \xff", "t.txt", "t.txt: byte 12 is no UTF-8"),
        (b"\xef\xbb\xbffine so far \xff", "t.txt", "byte 15 is no UTF-8"),
        (b"half a character \xc3", "t.txt", "byte 17 is no UTF-8"),
        (b"binary\0stuff", "t.txt", "byte 6 is zero"),
        ("UTF-16 in Windows".encode("utf-16"), "t.txt", "is zero"),
        (b'{"text": "\xc3\xa4"}\n{"text": "\xff"}', "t.jsonl", "t.jsonl, line 2: byte 25 is no UTF-8"),
        (b'{"text": "a"}\n\0', "t.txt", "line 2: byte 14 is zero"),
    ],
)
def test_bytes_that_are_no_text(checkpoint: Path, write: Write, content: bytes, name: str, words: str) -> None:
    assert words in refusal(CalibrationError, write(content, name), checkpoint)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not JSON", "is no JSON"),
        ('{"text": "unclosed', "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ('["text"]', "list; expected one JSON object a line"),
        ('"text"', "str; expected one"),
        ('{"prompt": "x", "answer": "y"}', "an object with answer, prompt; expected"),
        ('{"text": 3}', "`text` is int"),
        ('{"text": null}', "`text` is NoneType"),
        ('{"text": "\\ud800"}', "half a surrogate"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": "hello"}', "must be a list"),
        ('{"messages": ["hello"]}', "message 1 must have"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}', "message 2 must have"),
        ('{"messages": [{"role": 1, "content": "x"}]}', "message 1 must have"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1 must have"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "half a surrogate"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.txt"])
def test_a_bad_line_is_named(checkpoint: Path, write: Write, line: str, words: str, name: str) -> None:
    message = refusal(CalibrationError, write(jsonl({"text": "fine"}) + "\n" + line + "\n", name), checkpoint)
    assert f"{name}, line 3:" in message and words in message


def test_a_line_longer_than_what_is_read(checkpoint: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_ALWAYS_BYTES", 100)
    path = write(jsonl({"text": "fine"}, {"text": "x" * 500}), "t.jsonl")
    assert "line 2: longer than 256 bytes" in refusal(CalibrationError, path, checkpoint, samples=1)


@pytest.mark.parametrize("name", ["t.json", "T.JSONL", "t.ndjson"])
def test_json_files_that_are_no_json_lines(checkpoint: Path, write: Write, name: str) -> None:
    path = write(json.dumps([{"text": "one"}], indent=1), name)
    assert f"{name}, line 1: is no JSON" in refusal(CalibrationError, path, checkpoint)


def test_messages_without_a_chat_template(checkpoint: Path, write: Write, tmp_path: Path) -> None:
    folder = with_template(checkpoint, tmp_path / "m", None)
    path = write(jsonl({"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}), "t.jsonl")
    message = refusal(CalibrationError, path, folder)
    assert "t.jsonl, line 2:" in message and "no chat template" in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATE,
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}" + TEMPLATE,
        "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}" + TEMPLATE,
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}" + TEMPLATE,
        "{% for i in range(999999999) %}x{% endfor %}" + TEMPLATE,
        "{{ raise_exception('no\nthanks') }}",
        "{% if messages|length != 2 %}{{ 1 / 0 }}{% endif %}" + TEMPLATE,
        "{% if x %}",
    ],
)
def test_a_hostile_template_does_nothing_but_fail(
    checkpoint: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = with_template(checkpoint, tmp_path / "m", template)
    path = write(jsonl({"messages": [{"role": "user", "content": "abcdefgh"}]}), "t.jsonl")
    message = refusal(CalibrationError, path, folder)
    assert "t.jsonl, line 1:" in message and "chat template" in message
    assert not (tmp_path / "MARK").exists()


def test_files_that_are_not_there(checkpoint: Path, tmp_path: Path) -> None:
    message = refusal(CalibrationError, tmp_path / "none.txt", checkpoint)
    assert "none.txt: there is no such file" in message and "wikitext2" in message
    assert "is a folder" in refusal(CalibrationError, tmp_path, checkpoint)
    assert "no such file" in refusal(CalibrationError, "", checkpoint)
    assert "cannot be read" in refusal(CalibrationError, tmp_path / ("x" * 300), checkpoint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file(checkpoint: Path, write: Write) -> None:
    path = write(LINE)
    path.chmod(0)
    assert "t.txt: cannot be read" in refusal(CalibrationError, path, checkpoint)


def test_reading_that_fails_midway(checkpoint: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    message = refusal(CalibrationError, "-", checkpoint, stdin=Broken(b"a first line\nand more"))
    assert message == "standard input: cannot be read (Input/output error)"


def test_checkpoints_that_cannot_tokenize(checkpoint: Path, write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    message = refusal(CheckpointError, write(LINE), folder)
    assert "tokenizer.json: gives the id" in message and "has 100" in message
    (folder / "tokenizer.json").write_text("{}")
    assert "is no tokenizer" in refusal(CheckpointError, write(LINE), folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(CheckpointError, write(LINE), folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(ConfigError, write(LINE), folder)
