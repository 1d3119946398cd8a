"""The calibration text as the model reads it: windows of token ids, chosen by a seed, known by their hash."""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minibble.calibrate import datasets
from minibble.calibrate.documents import Documents, read_documents
from minibble.quantize.builtin import DEMO, demo_path, resolve_source
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import CalibrationError, CheckpointError, ConfigError
from minibble.runtime.loading import load_tokenizer

STDIN = "-"
DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
# How much of a long text is read. 32 bytes are about 8 tokens, so 8 windows stand for each that is wanted. Texts up
# to 4 MB always count whole; 256 MB take minutes to tokenize.
_BYTES_PER_TOKEN = 32
_ALWAYS_BYTES = 4_000_000
_MOST_BYTES = 256_000_000
# Tokenizing takes some 560 bytes of memory per token, so a long document goes through in pieces of so many characters,
# several at once on all cores.
_PIECE = 50_000
_BATCH = 32


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """Windows of a text: `ids` int64 [samples, seq_len], and what the manifest says of them.

    `source` is `demo`, `wikitext2`, `c4`, `-` or the file's name without its folder; `sha256` that of the ids.
    """

    ids: Tensor
    source: str
    seed: int
    sha256: str

    @property
    def samples(self) -> int:
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def to_json(self) -> dict[str, Any]:
        """`calibration` of the manifest."""
        sizes = {"samples": self.samples, "seq_len": self.seq_len, "tokens": self.tokens}
        return {"text": self.source, "sha256": self.sha256, **sizes, "seed": self.seed}


def read_calibration(
    source: str | Path | None,
    checkpoint: str | Path,
    *,
    samples: int | None = None,
    seq_len: int = DEFAULT_SEQ_LEN,
    seed: int = 0,
    stdin: BinaryIO | None = None,
) -> CalibrationText:
    """Windows of `seq_len` tokens of a text, as the tokenizer of the folder `checkpoint` sees it.

    The strings `demo` (or None: the built-in text), `-` (standard input), `wikitext2` and `c4` (through optimum) are
    names; files called so are meant by `./demo` or by a Path. A file is plain UTF-8 text, one document, or JSON lines
    with `text` or `messages`, a document each (`text` where there are both). The documents, joined by the tokenizer's
    end-of-text id, are cut into consecutive windows, of which `seed` chooses `samples`, kept in their order; None
    takes 128, or all if there are fewer. Of a long text only the start is read: 32 bytes for each token wanted, at
    least 4 MB and at most 256 MB.

    CalibrationError for a text that cannot be read, is empty or too short; ConfigError for impossible settings;
    CheckpointError for a missing tokenizer, or one with ids beyond the vocabulary of `config.json`.
    """
    _check_settings(samples, seq_len, seed)
    folder = resolve_source(checkpoint)
    vocab_size = ModelConfig.from_file(folder / "config.json").vocab_size
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: no tokenizer.json, so no text can be tokenized for it")
    source = DEMO if source is None else source
    if isinstance(source, str) and source in datasets.NAMES:
        ids = datasets.draw(source, tokenizer, samples or DEFAULT_SAMPLES, seq_len, seed)
    else:
        ids = _from_documents(source, tokenizer, samples, seq_len, seed, stdin)
    if (largest := int(ids.max())) >= vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: gives the id {largest}, but the vocabulary of config.json has {vocab_size}: "
            "it is another model's tokenizer"
        )
    return CalibrationText(ids, Path(source).name, seed, ids_sha256(ids))


def ids_sha256(ids: Tensor) -> str:
    """SHA-256 of `ids` [samples, seq_len] in lower-case hex: the two sizes, then the ids, little-endian int64."""
    assert ids.dtype == torch.int64 and ids.dim() == 2, "ids must be int64 [samples, seq_len]"
    sizes = b"".join(size.to_bytes(8, "little") for size in ids.shape)
    return hashlib.sha256(sizes + ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _check_settings(samples: int | None, seq_len: int, seed: int) -> None:
    if seq_len < 2:
        raise ConfigError(f"windows of {seq_len} tokens show nothing: take a --seq-len of at least 2")
    if samples is not None and samples < 1:
        raise ConfigError(f"{samples} samples are nothing to calibrate on: take at least 1")
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative: take 0 or more")


def _from_documents(
    source: str | Path, tokenizer: Any, samples: int | None, seq_len: int, seed: int, stdin: BinaryIO | None
) -> Tensor:
    """The chosen windows of a file, of standard input or of the built-in text, int64 [samples, seq_len]."""
    wanted = samples or DEFAULT_SAMPLES
    limit = min(max(_ALWAYS_BYTES, _BYTES_PER_TOKEN * wanted * seq_len), _MOST_BYTES)
    name = "standard input" if source == STDIN else "the built-in text" if source == DEMO else str(source)
    documents = _read(source, name, limit, tokenizer, stdin)
    stream = _tokenize(documents.texts, tokenizer)
    windows = _windows(stream, samples, seq_len, name, limit if documents.cut else None)
    return windows[_choose(len(windows), wanted, seed)]


def _read(source: str | Path, name: str, limit: int, tokenizer: Any, stdin: BinaryIO | None) -> Documents:
    try:
        with _opened(source, stdin) as stream:
            documents = read_documents(stream, name, limit, tokenizer)
    except FileNotFoundError as error:
        names = ", ".join((DEMO, *datasets.NAMES))
        raise CalibrationError(f"{name}: there is no such file; built in are {names}, - is standard input") from error
    except IsADirectoryError as error:
        raise CalibrationError(f"{name}: is a folder, expected a text file") from error
    except OSError as error:
        raise CalibrationError(f"{name}: cannot be read ({error.strerror or error})") from error
    if not any(text.strip() for text in documents.texts):
        raise CalibrationError(f"{name}: holds no text")
    return documents


def _opened(source: str | Path, stdin: BinaryIO | None) -> AbstractContextManager[BinaryIO]:
    if source == STDIN:
        return nullcontext(sys.stdin.buffer if stdin is None else stdin)
    return open(demo_path() / "calibration.txt" if source == DEMO else source, "rb")


def _tokenize(texts: list[str], tokenizer: Any) -> Tensor:
    """Ids of all documents, int64 [T], each told from the next by the tokenizer's end-of-text id, if it has one."""
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
    stream: list[Tensor] = []
    last = -1
    for start in range(0, len(pieces), _BATCH):
        batch = pieces[start : start + _BATCH]
        encoded = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (number, _), ids in zip(batch, encoded, strict=True):
            if ids:
                stream += [*(end if stream and number != last else []), torch.tensor(ids)]
                last = number
    return torch.cat(stream).long() if stream else torch.empty(0, dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `_PIECE` characters, each but the first beginning with a line break or a space.

    There a byte-level tokenizer begins a word too, so its ids are those of the whole text.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            breaks = (text.rfind(mark, start + 1, end) for mark in "\n ")
            end = next((found for found in breaks if found > 0), end)
        yield text[start:end]
        start = end


def _windows(stream: Tensor, samples: int | None, seq_len: int, name: str, limit: int | None) -> Tensor:
    """The consecutive windows of `stream` [T], int64 [windows, seq_len]; CalibrationError if fewer than `samples`.

    `limit` is the byte at which reading stopped, None where the text ended.
    """
    found = len(stream) // seq_len
    if found < (samples or 1):
        needed = (samples or 1) * seq_len
        read = "" if limit is None else f" in its first {limit:,} bytes, which is all that is read"
        remedies = [] if limit is not None else ["give more text"]
        remedies += [f"take --samples {found}" if found else "", "take a shorter --seq-len"]
        raise CalibrationError(
            f"{name}: {len(stream):,} tokens{read}, but {samples or 1} x {seq_len} need {needed:,}: "
            + " or ".join(filter(None, remedies))
        )
    return stream[: found * seq_len].view(found, seq_len)


def _choose(found: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `found` windows in ascending order: all if there are no more.

    Random().random() is the one sequence that Python promises to keep across versions; `sample` is not.
    """
    generator = random.Random(seed)
    order = sorted(range(found), key=lambda _: generator.random())
    return sorted(order[:wanted])
