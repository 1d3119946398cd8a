"""`minibble evaluate`."""

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return path


def test_json(cli_json, source, quantized, text) -> None:
    options = ("--text", text, "--seq-len", 32, "--windows", 3, "--device", "cpu")
    alone = cli_json("evaluate", quantized, *options)
    against = cli_json("evaluate", quantized, "--against", source, *options)
    assert set(alone) == {"tokens", "perplexity", "kl", "top1_agreement", "source_perplexity", "seconds"}
    assert alone["tokens"] == against["tokens"] == 3 * 31
    assert alone["perplexity"] == against["perplexity"]
    assert alone["kl"] is alone["top1_agreement"] is alone["source_perplexity"] is None
    assert 0 < against["kl"] < 1
    assert 0 < against["top1_agreement"] <= 1
    itself = cli_json("evaluate", source, "--against", source, "--dtype", "float32", *options)
    assert itself["kl"] < 1e-6
    assert itself["perplexity"] == against["source_perplexity"]


def test_table(cli, source, quantized, text) -> None:
    result = cli("evaluate", quantized, "--text", text, "--against", source, "--seq-len", 32, "--windows", 1)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("perplexity", "KL divergence", "same top token"))
    assert "1 of 1 windows (100 %)" in result.stderr


@pytest.mark.parametrize("content", [None, "short"])
def test_useless_text(cli, quantized, tmp_path, content) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    result = cli("evaluate", quantized, "--text", path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "text.txt" in result.stderr
    assert result.stderr.count("\n") == 1
