"""Data sets as calibration text: drawn by optimum, or one clear line."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden.calibration_text import ids_of, refusal, stream
from torch import Tensor

from minibble.calibrate import datasets
from minibble.calibrate.text import read_calibration
from minibble.quantize.errors import CalibrationError, CheckpointError


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
