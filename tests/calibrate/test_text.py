"""Calibration text: what is read, and which windows are chosen."""

import io
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden.byte_tokenizer import END_OF_TEXT
from golden.calibration_text import LINE, Endless, Write, ids_of, jsonl, refusal, stream, with_template

from minibble.calibrate import text
from minibble.calibrate.text import ids_sha256, read_calibration
from minibble.quantize.builtin import demo_path
from minibble.quantize.errors import CalibrationError
from minibble.runtime.evaluate import _windows as evaluated_windows

PARTS_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][0]['text'] + '\n' }}{% endfor %}"


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
