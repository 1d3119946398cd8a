"""Perplexity, KL and agreement against figures computed here from an oracle's logits."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import tiny, transformers_oracle
from golden.byte_tokenizer import VOCAB_SIZE, byte_tokenizer, save_byte_tokenizer
from golden.tiny_models import shared_model
from safetensors.torch import load_file
from torch import Tensor

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime import evaluate as scoring
from minibble.runtime import loading
from minibble.runtime.evaluate import evaluate

TEXT = "The quick brown fox jumps over the lazy dog; ümläute count as several bytes.\n" * 5
SEQ_LEN = 64
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_source: Make) -> Path:
    folder = make_source(tmp_path_factory.mktemp("source") / "m", config=tiny.hf_json(vocab_size=VOCAB_SIZE))
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "m"
    quantize_checkpoint(source, out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, 4-bit ones decoded by bitsandbytes, float32."""
    stored = {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}
    weights = {}
    for name in [name for name in stored if name.endswith(".weight")]:
        parts = {key.removeprefix(name + "."): t for key, t in stored.items() if key.startswith(name + ".")}
        weights[name] = stored[name].float()
        if parts:
            functional = pytest.importorskip("bitsandbytes").functional
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            weights[name] = functional.dequantize_4bit(stored[name], state)
    return weights


def log_probabilities(folder: Path, windows: list[list[int]]) -> Tensor:
    """transformers' mended port on every window: float64 [windows, T-1, V]."""
    config = ModelConfig.from_file(folder / "config.json")
    logits = transformers_oracle.logits(config, weights_of(folder), windows)
    return torch.stack(logits)[:, :-1].double().log_softmax(-1)


def cut(tokens: list[int], seq_len: int) -> list[list[int]]:
    return [tokens[i : i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]


def test_figures_equal_those_of_the_oracle(source: Path, quantized: Path, text: Path) -> None:
    windows = cut(byte_tokenizer()(TEXT)["input_ids"], SEQ_LEN)
    assert len(windows) >= 5
    own, theirs = log_probabilities(quantized, windows), log_probabilities(source, windows)
    target = torch.tensor(windows)[:, 1:, None]
    result = evaluate(quantized, text, source, seq_len=SEQ_LEN, dtype=torch.float32)
    assert result.tokens == len(windows) * (SEQ_LEN - 1)
    assert result.perplexity == pytest.approx(math.exp(-own.gather(2, target).mean()), rel=1e-4)
    assert result.source_perplexity == pytest.approx(math.exp(-theirs.gather(2, target).mean()), rel=1e-4)
    assert result.kl == pytest.approx(float((theirs.exp() * (theirs - own)).sum(-1).mean()), rel=1e-3)
    agreement = (own.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agreement), abs=1.5 / result.tokens)
    assert result.kl > 1e-3, "4 bits cost nothing here: the test shows nothing"


def test_a_model_agrees_with_itself(source: Path, text: Path) -> None:
    result = evaluate(source, text, source, seq_len=SEQ_LEN, max_windows=3)
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.source_perplexity


def test_without_a_source(quantized: Path, text: Path) -> None:
    result = evaluate(quantized, text, seq_len=SEQ_LEN, max_windows=2)
    assert result.tokens == 2 * (SEQ_LEN - 1)
    assert (result.kl, result.top1_agreement, result.source_perplexity) == (None, None, None)
    alone = evaluate(quantized, text, quantized, seq_len=SEQ_LEN, max_windows=2)
    assert alone.perplexity == result.perplexity


def test_windows_in_pieces(source: Path, quantized: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows longer than what goes through the layers at a time, and than what is scored at a time."""
    whole = evaluate(quantized, text, source, seq_len=SEQ_LEN)
    monkeypatch.setattr(loading, "default_prefill_chunk", lambda device: 7)
    monkeypatch.setattr(scoring, "SCORED", 10)
    pieces = evaluate(quantized, text, source, seq_len=SEQ_LEN)
    assert pieces.tokens == whole.tokens and pieces.top1_agreement == whole.top1_agreement
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-5) and pieces.kl == pytest.approx(
        whole.kl, rel=1e-3
    )


def test_progress_counts_windows(source: Path, text: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(source, text, seq_len=SEQ_LEN, max_windows=3, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("seq_len", [0, 1, -5, 100_000])
def test_windows_that_cannot_be(seq_len: int, source: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="window"):
        evaluate(source, text, seq_len=seq_len)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_windows_wanted(limit: int, source: Path, text: Path) -> None:
    with pytest.raises(ConfigError):
        evaluate(source, text, seq_len=SEQ_LEN, max_windows=limit)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\xd8"])
def test_text_that_cannot_be_read(content: bytes | None, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"text\.txt"):
        evaluate(source, path, seq_len=4)


def test_sources_of_another_kind(source: Path, text: Path, make_source: Make, tmp_path: Path) -> None:
    other = make_source(tmp_path / "m", config=tiny.hf_json(vocab_size=VOCAB_SIZE + 4))
    save_byte_tokenizer(other)
    with pytest.raises(CheckpointError, match="vocabulary"):
        evaluate(source, text, other, seq_len=SEQ_LEN)
    for file in (*other.glob("tokenizer*"), *other.glob("special_tokens*")):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate(other, text, seq_len=SEQ_LEN)


def test_trained_model_has_its_known_perplexity(tmp_path: Path) -> None:
    """reference-a: the oracle's perplexity on real text; 4 bits move it little and KL to a known size."""
    folder = shared_model()
    text = folder.parent / "reference-a.eval.txt"
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8")[:8_000], add_special_tokens=False)["input_ids"]
    windows = cut(ids, 512)[:2]
    p = log_probabilities(folder, windows)
    expected = math.exp(-p.gather(2, torch.tensor(windows)[:, 1:, None]).mean())
    quantize_checkpoint(folder, tmp_path / "q")
    result = evaluate(tmp_path / "q", text, folder, max_windows=2, dtype=torch.float32)
    assert result.source_perplexity == pytest.approx(expected, rel=1e-4)
    assert expected < 35
    assert result.perplexity == pytest.approx(expected, rel=0.03)
    assert result.kl == pytest.approx(0.0095, rel=0.25)
    assert result.top1_agreement == pytest.approx(0.932, abs=0.02)
