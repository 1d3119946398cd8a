"""Calibration text: what is read, which windows are chosen, and one clear line for everything that cannot be used."""

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden.byte_tokenizer import END_OF_TEXT, TEMPLATE, VOCAB_SIZE, byte_tokenizer, save_byte_tokenizer
from torch import Tensor

from minibble.calibrate import datasets, text
from minibble.calibrate.text import CalibrationText, ids_sha256, read_calibration
from minibble.quantize.builtin import demo_path
from minibble.quantize.errors import CalibrationError, CheckpointError, ConfigError, MinibbleError
from minibble.runtime.evaluate import _windows as evaluated_windows

LINE = "The quick brown fox jumps over the lazy dog; ümläute count as several bytes.\r\n"
PARTS_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][0]['text'] + '\n' }}{% endfor %}"
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    """A folder with all that reading a text needs: a tokenizer of single bytes, and a config."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(tiny_config(vocab_size=VOCAB_SIZE)))
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Factory `write(content, name="t.txt")`: a file of text or bytes."""

    def file(content: str | bytes, name: str = "t.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


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


# ---- what the ids are


def test_the_default_is_the_built_in_text_for_the_built_in_model() -> None:
    found = read_calibration(None, demo_path())
    content = (demo_path() / "calibration.txt").read_bytes().decode()
    model = SimpleNamespace(tokenizer=text.load_tokenizer(demo_path()))
    windows = evaluated_windows(model, demo_path() / "calibration.txt", 2048, None)  # type: ignore[arg-type]
    assert "\r" not in content  # else evaluate's reading would differ
    assert found.samples == len(windows) == 73 and torch.equal(found.ids, torch.stack(windows))
    assert found.to_json() == {
        "text": "demo", "sha256": found.sha256, "samples": 73, "seq_len": 2048, "tokens": 73 * 2048, "seed": 0
    }  # fmt: skip


def test_the_hash_of_the_built_in_text_is_pinned() -> None:
    """Another choice of windows, another tokenization or another hash would make old manifests unrepeatable."""
    found = read_calibration("demo", Path("demo"), samples=4, seq_len=64)
    assert found.sha256 == "48ea1bf2b1f295b74279f9120ec6d7386c0e3227c496b341394f4369543eec82"
    assert found.ids.dtype == torch.int64 and found.ids.shape == (4, 64) and found.ids.is_contiguous()


def test_a_plain_text_is_one_document_with_its_own_line_endings(checkpoint: Path, write: Write) -> None:
    found = read_calibration(write(LINE), checkpoint, seq_len=5)
    assert found.source == "t.txt" and stream(found) == ids_of(LINE)[: found.tokens]
    assert len(ids_of(LINE)) - 5 < found.tokens <= len(LINE.encode())


def test_a_byte_order_mark_is_no_text(checkpoint: Path, write: Write) -> None:
    plain = read_calibration(write(LINE, "a.txt"), checkpoint, seq_len=5)
    marked = read_calibration(write(b"\xef\xbb\xbf" + LINE.encode(), "b.txt"), checkpoint, seq_len=5)
    assert marked.sha256 == plain.sha256
    lines = write(b"\xef\xbb\xbf" + jsonl({"text": LINE}).encode(), "c.txt")
    assert read_calibration(lines, checkpoint, seq_len=5).sha256 == plain.sha256


@pytest.mark.parametrize("name", ["t.jsonl", "t.NDJSON", "t.json", "t.txt", "t"])
def test_json_lines_are_documents_told_apart(checkpoint: Path, write: Write, name: str) -> None:
    path = write(
        "\n \r\n" + jsonl({"text": "eins\u2028zwei"}, {"id": 7, "text": ""}, {"text": "drei\n", "messages": 3}), name
    )
    expected = [*ids_of("eins\u2028zwei"), END_OF_TEXT, *ids_of("drei\n")]
    assert stream(read_calibration(path, checkpoint, seq_len=len(expected))) == expected


def test_documents_are_joined_bare_where_the_tokenizer_has_no_end(
    checkpoint: Path, write: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write(jsonl({"text": "abcd"}, {"text": "efgh"}), "t.jsonl")
    assert stream(read_calibration(path, folder, seq_len=8)) == ids_of("abcdefgh")


def test_messages_go_through_the_chat_template(checkpoint: Path, write: Write) -> None:
    parts = [{"type": "text", "text": "Yes, "}, {"type": "text", "text": "I do."}]
    turns = [{"role": "user", "content": "Do you?"}, {"role": "assistant", "content": parts}]
    path = write(jsonl({"messages": turns}, {"text": "plain"}), "t.jsonl")
    rendered = "<|im_start|>user\nDo you?<|im_end|>\n<|im_start|>assistant\nYes, I do.<|im_end|>\n"
    expected = [*ids_of(rendered), END_OF_TEXT, *ids_of("plain")]
    assert len(expected) < len(rendered)  # the marks are one id each
    assert stream(read_calibration(path, checkpoint, seq_len=len(expected))) == expected


def test_a_template_that_wants_content_in_parts_gets_parts(checkpoint: Path, write: Write, tmp_path: Path) -> None:
    folder = with_template(checkpoint, tmp_path / "m", PARTS_TEMPLATE)
    path = write(jsonl({"messages": [{"role": "user", "content": "Why?"}]}), "t.jsonl")
    assert stream(read_calibration(path, folder, seq_len=11)) == ids_of("user: Why?\n")


def test_standard_input(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_calibration("-", checkpoint, seq_len=8, stdin=io.BytesIO(b"abcdefgh" * 2))
    assert found.source == "-" and stream(found) == ids_of("abcdefgh" * 2)
    lines = io.BytesIO(jsonl({"text": "abcd"}, {"text": "efg"}).encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines))
    assert stream(read_calibration("-", checkpoint, seq_len=8)) == [*ids_of("abcd"), END_OF_TEXT, *ids_of("efg")]


@pytest.mark.parametrize("name", ["demo", "-", "c4"])
def test_names_win_over_files_unless_given_as_a_path(
    checkpoint: Path, write: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write("own text", name)
    monkeypatch.chdir(path.parent)
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", None)  # not installed
    for file in (Path(name), f"./{name}", path):
        assert stream(read_calibration(file, checkpoint, seq_len=8)) == ids_of("own text")
    if name == "demo":
        assert read_calibration(name, checkpoint, seq_len=8).samples == 128
    else:
        refusal(CalibrationError, name, checkpoint, stdin=io.BytesIO())


# ---- which windows


def test_windows_are_consecutive_and_the_seed_chooses(checkpoint: Path, write: Write) -> None:
    content = "".join(f"{number:07d}\n" for number in range(50)) + "rest"
    path = write(content)
    every = read_calibration(path, checkpoint, seq_len=8)
    assert every.ids.tolist() == [ids_of(f"{number:07d}\n") for number in range(50)]
    chosen = [read_calibration(path, checkpoint, samples=10, seq_len=8, seed=seed) for seed in (0, 0, 1)]
    numbers = [[every.ids.tolist().index(window) for window in found.ids.tolist()] for found in chosen]
    assert numbers[0] == numbers[1] and chosen[0].sha256 == chosen[1].sha256
    assert all(order == sorted(set(order)) and len(order) == 10 for order in numbers)
    assert numbers[0] != numbers[2] and chosen[0].sha256 != chosen[2].sha256 and chosen[2].seed == 1
    assert numbers[0] != list(range(10))  # chosen, not cut off
    assert read_calibration(path, checkpoint, samples=50, seq_len=8, seed=3).sha256 == every.sha256


def test_the_default_is_128_windows(checkpoint: Path, write: Write) -> None:
    assert read_calibration(write("ab" * 200), checkpoint, seq_len=2).samples == 128


def test_choosing_leaves_the_global_random_state_alone(checkpoint: Path, write: Write) -> None:
    before = random.getstate(), torch.get_rng_state()
    read_calibration(write(LINE), checkpoint, samples=2, seq_len=8)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_every_window_is_chosen_about_as_often() -> None:
    """10 of 50 windows over 400 seeds: each 80 times, standard deviation 8."""
    counts = torch.zeros(50)
    for seed in range(400):
        counts[text._choose(50, 10, seed)] += 1
    assert counts.sum() == 4000 and counts.min() > 45 and counts.max() < 115


def test_the_hash_is_of_ids_and_shape() -> None:
    ids = torch.arange(12).view(3, 4)
    other = ids.clone()
    other[2, 3] += 1
    hashes = {ids_sha256(value) for value in (ids, other, ids.view(4, 3), ids.view(2, 6), ids.t().contiguous())}
    assert len(hashes) == 5
    assert ids_sha256(ids.t().contiguous().t()) == ids_sha256(ids)
    assert ids_sha256(torch.tensor([[1, 2]])) == "60cb1131bd82441237f153b62397d13966681fa269ce80e4fcedfffc7fd8dd92"


def test_long_documents_have_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces for tokenizing, the built-in tokenizer's words stay whole; only words beyond a piece break."""
    tokenizer = text.load_tokenizer(demo_path())
    content = (demo_path() / "calibration.txt").read_text(encoding="utf-8")[:30_000]
    whole = tokenizer(content, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(text, "_PIECE", 150)
    assert len(list(text._pieces(content))) > 200 and "".join(text._pieces(content)) == content
    assert text._tokenize([content], tokenizer).tolist() == whole
    assert list(text._pieces("x" * 310)) == ["x" * 150, "x" * 150, "x" * 10]


def test_a_long_text_is_read_at_its_start_only(checkpoint: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_ALWAYS_BYTES", 1000)
    endless = Endless(b"no line ever ends. ")
    found = read_calibration("-", checkpoint, samples=4, seq_len=8, stdin=endless)  # type: ignore[arg-type]
    assert found.ids.shape == (4, 8) and endless.given <= 1001 + 32 * 4 * 8
    lines = Endless(b'{"text": "abcdefgh"}\n')
    found = read_calibration("-", checkpoint, samples=4, seq_len=8, stdin=lines)  # type: ignore[arg-type]
    assert found.ids.shape == (4, 8) and lines.given <= 4 * (1001 + 32 * 4 * 8)
    # What lies behind the limit cannot matter.
    long = LINE * 100
    settings: dict[str, Any] = {"samples": 2, "seq_len": 8}
    first = read_calibration(write(long), checkpoint, **settings)
    again = read_calibration(write(long[: len(long) // 2].encode() + b"\xff\0"), checkpoint, **settings)
    assert first.sha256 == again.sha256


def test_half_a_character_at_the_limit_is_left_out(
    checkpoint: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_MOST_BYTES", 1024)
    path = write("x" + "ä" * 2000)
    assert stream(read_calibration(path, checkpoint, samples=1, seq_len=1023)) == ids_of("x" + "ä" * 511)


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


# ---- what is refused


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


# ---- data sets


def optimum_like(**functions: Any) -> SimpleNamespace:
    """A stand-in for `optimum.gptq.data`, whose functions draw as optimum 2.3.0's do."""

    def window(ids: Tensor, seqlen: int) -> dict[str, Tensor]:
        start = random.randint(0, ids.shape[1] - seqlen - 1)
        return {"input_ids": ids[:, start : start + seqlen], "attention_mask": torch.ones(1, seqlen)}

    def get_wikitext2(tokenizer: Any, seqlen: int, nsamples: int, split: str = "train") -> list[dict[str, Tensor]]:
        ids = tokenizer("".join(f"{number:07d}\n" for number in range(50)), return_tensors="pt").input_ids
        return [window(ids, seqlen) for _ in range(nsamples)]

    def get_c4(tokenizer: Any, seqlen: int, nsamples: int, split: str = "train") -> list[dict[str, Tensor]]:
        found = []
        for _ in range(nsamples):
            while True:
                ids = tokenizer("x" * random.randint(1, 20), return_tensors="pt").input_ids
                if ids.shape[1] >= seqlen:
                    break
            found.append(window(ids, seqlen))
        return found

    return SimpleNamespace(**{"get_wikitext2": get_wikitext2, "get_c4": get_c4, **functions})


@pytest.mark.parametrize("name", datasets.NAMES)
def test_data_sets_are_drawn_by_optimum(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", optimum_like())
    before = random.getstate()
    found = [read_calibration(name, checkpoint, samples=30, seq_len=16, seed=seed) for seed in (5, 5, 6)]
    assert random.getstate() == before
    assert found[0].source == name and found[0].ids.shape == (30, 16) and found[0].ids.dtype == torch.int64
    assert found[0].sha256 == found[1].sha256
    assert name == "c4" or found[0].sha256 != found[2].sha256
    assert set(stream(found[0])) <= set(ids_of("0123456789\nx"))
    assert read_calibration(name, checkpoint, seq_len=16).samples == 128


def test_data_sets_too_short_for_the_windows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """optimum would search C4 for ever, and stumble over a document of exactly the window's length."""
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", optimum_like())
    monkeypatch.setitem(datasets._SHORT_IN_A_ROW, "c4", 200)
    assert "c4: 201 documents in a row" in refusal(CalibrationError, "c4", checkpoint, seq_len=20)
    assert read_calibration("c4", checkpoint, samples=20, seq_len=19).samples == 20
    assert "wikitext2: 400 tokens, too short" in refusal(CalibrationError, "wikitext2", checkpoint, seq_len=400)


def test_data_sets_beyond_the_vocabulary(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", optimum_like())
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    (folder / "config.json").write_text(json.dumps(tiny_config(vocab_size=4)))
    assert "tokenizer.json: gives the id" in refusal(CheckpointError, "wikitext2", folder)


def failing(error: Exception) -> Callable[..., Any]:
    def get(tokenizer: Any, seqlen: int, nsamples: int, split: str = "train") -> Any:
        raise error

    return get


@pytest.mark.parametrize("name", datasets.NAMES)
def test_data_sets_that_cannot_be_had(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install = "pip install 'minibble[datasets]', or give a text file instead"
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", None)
    assert install in refusal(CalibrationError, name, checkpoint)

    def library(function: Callable[..., Any]) -> None:
        monkeypatch.setitem(sys.modules, "optimum.gptq.data", optimum_like(**{f"get_{name}": function}))

    library(failing(ImportError("you need to install datasets in order to use this function")))
    message = refusal(CalibrationError, name, checkpoint)
    assert install in message and "need to install datasets" in message
    library(failing(ConnectionError("Couldn't reach it\non the Hub " + "x" * 1000)))
    message = refusal(CalibrationError, name, checkpoint)
    assert f"{name} cannot be fetched (ConnectionError: Couldn't reach it on the Hub" in message
    assert message.endswith("try where there is a network, or give a text file instead")
    library(lambda tokenizer, seqlen, nsamples: [{"input_ids": torch.zeros(1, seqlen)}])
    assert "optimum gave torch.float32 (1, 8)" in refusal(CalibrationError, name, checkpoint, samples=1)
    library(lambda tokenizer, seqlen, nsamples: [{"input_ids": torch.zeros(1, seqlen, dtype=torch.int64)}])
    assert "optimum gave torch.int64 (1, 8)" in refusal(CalibrationError, name, checkpoint, samples=2)
