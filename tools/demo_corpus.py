"""Writes the corpus of the built-in model, and its tokenizer, from what this Python carries.

    python tools/demo_corpus.py OUT

A unit (see demo_units.py) is trained on, kept for choosing between checkpoints (dev) or held out as a whole, by the
hash of its name; its documentation, source and chat go the same way. A paragraph that the standard library repeats is
kept once, and a held-out unit that still shares wording with the training text is dropped. Documents are joined by
`<|endoftext|>`. OUT gets prose.txt (documentation and chats) and source.txt, which are trained on, calibration.txt (a
part of prose.txt), dev.txt and heldout.txt (documentation only), tokenizer.json and corpus.json (counts).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path

from demo_units import Unit, all_units, prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 2048
HELDOUT_SHARE, DEV_SHARE = 0.08, 0.03
CALIBRATION_BYTES = 500_000
MIN_REPEAT = 60  # characters from which on a second copy of a paragraph is dropped
SHINGLE, MAX_SHARED = 8, 0.2  # words in a shingle; share of a held-out unit's shingles that training text may have


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def part(unit: Unit) -> str:
    u = digest(unit.name) / 2**64
    return "heldout" if u < HELDOUT_SHARE else "dev" if u < HELDOUT_SHARE + DEV_SHARE else "train"


def squeeze(paragraph: str) -> str:
    return " ".join(paragraph.split())


def drop_repeats(units: Iterable[Unit]) -> list[Unit]:
    """Removes every documentation paragraph that an earlier unit has, and units that nothing is left of."""
    seen: set[str] = set()
    kept = []
    for unit in units:
        unit.chats = [chat for chat in unit.chats if chat[1] not in seen]
        paragraphs = []
        for paragraph in unit.doc.split("\n\n"):
            key = squeeze(paragraph)
            if len(key) < MIN_REPEAT or key not in seen:
                paragraphs.append(paragraph)
            if len(key) >= MIN_REPEAT:
                seen.add(key)
        text = "\n\n".join(paragraphs)
        unit.doc = text if prose(text) else ""
        if unit.doc or unit.source:
            kept.append(unit)
    return kept


def chat(unit: Unit) -> list[str]:
    """The unit's questions as conversations of one to three turns."""
    turns = []
    for question, answer in unit.chats:
        sentence = answer if answer[-1] in ".!?:" else answer + "."
        turns.append(f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{sentence}{IM_END}\n")
    size = 1 + digest(unit.name + "#chat") % 3
    return ["".join(turns[i : i + size]) for i in range(0, len(turns), size)]


def shingles(text: str) -> set[int]:
    words = text.lower().split()
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def unshared(units: list[Unit], known: set[int]) -> list[str]:
    """The documentation of those units that share little wording with `known`."""
    texts = []
    for unit in units:
        own = shingles(unit.doc)
        if unit.doc and own and len(own & known) / len(own) <= MAX_SHARED:
            texts.append(unit.doc)
    return texts


def shuffled(documents: list[str]) -> list[str]:
    """In the order of their hashes, which is as good as random and the same everywhere."""
    return sorted(documents, key=digest)


def joined(documents: list[str]) -> str:
    return "".join(document + "\n" + END for document in documents)


def build() -> tuple[dict[str, str], dict]:
    """The texts by file name, and what they were made of."""
    by_part: dict[str, list[Unit]] = {"train": [], "dev": [], "heldout": []}
    for unit in drop_repeats(all_units()):
        by_part[part(unit)].append(unit)
    trained = by_part["train"]
    prose_documents = shuffled([u.doc for u in trained if u.doc] + [c for u in trained for c in chat(u)])
    source_documents = [u.source for u in trained if u.source]
    known = set().union(*(shingles(document) for document in prose_documents + source_documents))
    calibration: list[str] = []
    for document in prose_documents:
        if sum(map(len, calibration)) < CALIBRATION_BYTES:
            calibration.append(document)
    documents = {
        "prose.txt": prose_documents,
        "source.txt": shuffled(source_documents),
        "calibration.txt": calibration,
        "dev.txt": shuffled(unshared(by_part["dev"], known)),
        "heldout.txt": shuffled(unshared(by_part["heldout"], known)),
    }
    texts = {name: joined(group) for name, group in documents.items()}
    made_of = {
        "python": platform.python_version(),
        "bytes": {name: len(text.encode()) for name, text in texts.items()},
        "documents": {name: len(group) for name, group in documents.items()},
        "chat_bytes": sum(len(c.encode()) for u in trained for c in chat(u)),
    }
    return texts, made_of


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE over the documentation and chats; any text comes back unchanged from encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for token in (END, IM_START, IM_END):
        text = text.replace(token, "\n")
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    texts, made_of = build()
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(texts["prose.txt"])
    tokenizer.save(str(out / "tokenizer.json"))
    made_of["tokens"] = {name: len(tokenizer.encode(text).ids) for name, text in texts.items()}
    (out / "corpus.json").write_text(json.dumps(made_of, indent=2) + "\n")
    print(json.dumps(made_of, indent=2))


if __name__ == "__main__":
    main()
