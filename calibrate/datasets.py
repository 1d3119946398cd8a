"""The public data sets of the GPTQ paper, drawn by `optimum.gptq` where it is installed."""

import importlib
import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.errors import CalibrationError

NAMES = ("wikitext2", "c4")
# Documents too short for a window that are drawn one after another before the search is given up: optimum reads
# wikitext2 as one document, but of C4's, most are shorter than a usual window.
_SHORT_IN_A_ROW = {"wikitext2": 0, "c4": 20_000}
_INSTEAD = "or give a text file instead"


def draw(name: str, tokenizer: Any, samples: int, seq_len: int, seed: int) -> Tensor:
    """`samples` windows of the data set `name`, int64 [samples, seq_len], drawn by optimum from `seed`.

    optimum draws with replacement, so windows may overlap: its wikitext2 is the first 1000 lines of the training
    part (290,000 characters). CalibrationError where optimum or the network is missing, or `seq_len` is longer than
    the documents.
    """
    try:
        library = importlib.import_module("optimum.gptq.data")
    except Exception as error:  # a version that does not fit transformers fails in its own way
        raise _not_installed(name, error) from error
    state = random.getstate()
    random.seed(seed)
    try:
        drawn = getattr(library, f"get_{name}")(_Encoder(tokenizer, name, seq_len), seq_len, samples)
        ids = torch.cat([sample["input_ids"] for sample in drawn])
    except CalibrationError:
        raise
    except ImportError as error:  # optimum asks for `datasets` only now
        raise _not_installed(name, error) from error
    except Exception as error:  # whatever the network, the cache and their libraries come up with
        raise CalibrationError(
            f"{name} cannot be fetched ({one_line(error)}): try where there is a network, {_INSTEAD}"
        ) from error
    finally:
        random.setstate(state)
    if ids.dtype != torch.int64 or ids.shape != (samples, seq_len):
        found = f"{ids.dtype} {tuple(ids.shape)}"
        raise CalibrationError(
            f"{name}: optimum gave {found}, expected torch.int64 {(samples, seq_len)}: install optimum 2.3, {_INSTEAD}"
        )
    return ids


def one_line(error: Exception) -> str:
    """The kind of `error` and the beginning of what it says, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def _not_installed(name: str, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{name} needs optimum and datasets ({one_line(error)}): pip install 'minibble[datasets]', {_INSTEAD}"
    )


class _Encoder:
    """The tokenizer as optimum calls it, without special tokens and with an end to the search for long documents."""

    def __init__(self, tokenizer: Any, name: str, seq_len: int):
        self.tokenizer, self.name, self.seq_len = tokenizer, name, seq_len
        self._short = 0

    def __call__(self, text: str, return_tensors: str = "pt") -> SimpleNamespace:
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).long()
        if len(ids) > self.seq_len:
            self._short = 0
            return SimpleNamespace(input_ids=ids[None])
        self._short += 1
        if self._short > _SHORT_IN_A_ROW[self.name]:
            what = f"{self._short:,} documents in a row" if self._short > 1 else f"{len(ids):,} tokens"
            raise CalibrationError(
                f"{self.name}: {what}, too short for a window of {self.seq_len:,}: take a shorter --seq-len, {_INSTEAD}"
            )
        # Of exactly seq_len tokens optimum would accept the document, then fail to draw its window's start.
        return SimpleNamespace(input_ids=ids[None, : self.seq_len - 1])
