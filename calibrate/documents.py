"""Documents of a calibration text: a plain text is one, JSON lines hold one each.

Bytes are read, not lines of text: no line ending is translated, so every platform sees the same tokens.
"""

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from minibble.calibrate.datasets import one_line
from minibble.quantize.errors import CalibrationError, MinibbleError
from minibble.runtime.chat import ChatTemplate

JSON_LINES = (".jsonl", ".ndjson", ".json")
_EXPECTED = "expected one JSON object a line, with `text` or `messages`"


@dataclass(frozen=True)
class Documents:
    """Texts in the order read; `cut` where there may be more behind the limit of reading."""

    texts: list[str]
    cut: bool


def read_documents(stream: BinaryIO, name: str, limit: int, tokenizer: Any) -> Documents:
    """The documents of `stream`, until they hold `limit` bytes of text.

    JSON lines are known by the ending of `name`, or by a first line that is an object with `text` or `messages`;
    everything else is one plain text. CalibrationError names `name`, and the line or the byte, of what is neither.
    """
    if Path(name).suffix.lower() in JSON_LINES:
        return _json_lines(_lines(stream, limit), name, limit, _Chat(tokenizer))
    head = _through_first_text(stream, limit)
    if _is_document(head):
        return _json_lines(chain(BytesIO(head), _lines(stream, limit)), name, limit, _Chat(tokenizer))
    data = head + stream.read(max(limit + 1 - len(head), 0))
    cut = len(data) > limit
    return Documents([_decode(data[:limit], name, 0, final=not cut)], cut)


def _lines(stream: BinaryIO, limit: int) -> Iterable[bytes]:
    """Lines of `stream`; one that is longer than `limit` comes as its first `limit + 1` bytes."""
    return iter(lambda: stream.readline(limit + 1), b"")


def _through_first_text(stream: BinaryIO, limit: int) -> bytes:
    """What `stream` begins with, up to its first line that is not blank, at most `limit + 1` bytes."""
    head = bytearray()
    while len(head) <= limit:
        line = stream.readline(limit + 1 - len(head))
        head += line
        if not line or line.strip():
            break
    return bytes(head)


def _is_document(head: bytes) -> bool:
    try:
        found = json.loads(head.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint(("text", "messages"))


def _json_lines(lines: Iterable[bytes], name: str, limit: int, chat: "_Chat") -> Documents:
    texts: list[str] = []
    nbytes = offset = 0
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        if len(line) > limit:
            raise CalibrationError(f"{where}: longer than {limit:,} bytes, all that is read: split the document")
        content = _decode(line, where, offset, final=True)
        offset += len(line)
        if not content.strip():
            continue
        texts.append(_document(content, where, chat))
        nbytes += _utf8_length(texts[-1], where)
        if nbytes >= limit:
            return Documents(texts, cut=True)
    return Documents(texts, cut=False)


def _decode(data: bytes, where: str, offset: int, final: bool) -> str:
    """`data`, which begins at byte `offset` of the file, as text; unless `final`, half a character may end it.

    A byte order mark at the start of the file is left out.
    """
    zero = data.find(0)
    if zero >= 0:
        raise CalibrationError(f"{where}: byte {offset + zero} is zero, so this is no text in UTF-8: save it as such")
    try:
        text = codecs.utf_8_decode(data, "strict", final)[0]
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: byte {offset + error.start} is no UTF-8 ({error.reason}): save the text as UTF-8"
        ) from error
    return text if offset else text.removeprefix("\ufeff")


def _utf8_length(text: str, where: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise CalibrationError(f"{where}: character {error.start} of the text is half a surrogate pair") from error


def _document(line: str, where: str, chat: "_Chat") -> str:
    """The text of one JSON line: its `text`, else its `messages` through the chat template."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: is no JSON ({one_line(error)}); {_EXPECTED}") from error
    if not isinstance(found, dict) or found.keys().isdisjoint(("text", "messages")):
        what = f"an object with {', '.join(sorted(found)[:8])}" if isinstance(found, dict) else type(found).__name__
        raise CalibrationError(f"{where}: {what}; {_EXPECTED}")
    if "text" not in found:
        return chat.render(found["messages"], where)
    if not isinstance(found["text"], str):
        raise CalibrationError(f"{where}: `text` is {type(found['text']).__name__}, expected a string")
    return found["text"]


class _Chat:
    """The checkpoint's chat template, looked at when the first `messages` come."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def render(self, messages: Any, where: str) -> str:
        """The conversation as text; transformers renders templates in jinja's sandbox, which is not loosened here."""
        if self.tokenizer.chat_template is None:
            raise CalibrationError(
                f"{where}: `messages`, but the checkpoint has no chat template: write each conversation as `text`"
            )
        turns = _turns(messages, where)
        try:
            self._template = self._template or ChatTemplate(self.tokenizer)
            return self._template.render(turns)
        except MinibbleError as error:
            raise CalibrationError(f"{where}: {error}") from error
        except Exception as error:  # a template raises whatever it likes
            raise CalibrationError(f"{where}: the chat template refuses these messages ({one_line(error)})") from error


def _turns(messages: Any, where: str) -> list[tuple[str, str]]:
    """Role and text of each message; a content in parts is joined if every part is text."""
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(f"{where}: `messages` must be a list of at least one message")
    turns = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
            content = None if len(texts) < len(content) else "".join(texts)
        if not isinstance(role, str) or not isinstance(content, str):
            raise CalibrationError(f"{where}: message {number} must have `role` and `content`, both text")
        turns.append((role, content))
    return turns
