"""What a command writes: results on stdout, everything else on stderr."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from minibble.quantize.sizes import decimal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Width of tables that go into a pipe or a file, where no terminal says it.
PIPE_WIDTH = 100


def emit_json(result: Mapping[str, Any]) -> None:
    """Print `result` as the one JSON object of the command; NaN and infinity become null."""
    click.echo(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def console(stderr: bool = False) -> "Console":
    """A rich console on stdout or stderr, with a fixed width where that is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def show(*renderables: "RenderableType") -> None:
    """Print tables and text for people on stdout."""
    out = console()
    for renderable in renderables:
        out.print(renderable)


def note(message: str) -> None:
    """One line on stderr."""
    click.echo(f"minibble: {message}", err=True)


def describe(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{named}"
    return " ".join(str(error).split()) or type(error).__name__


def duration(seconds: float) -> str:
    """12 s, 3:05 min or 2:10 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


class ProgressLine:
    """Progress of a job on stderr: a bar on a terminal, else a line every `interval_s` seconds.

    Use as a context manager and call `update(done, total, current)`; `unit` is "bytes" or the name of what is
    counted. The rate and the time left count from the first update, so that a resumed job does not flatter itself.
    """

    def __init__(self, title: str, unit: str = "bytes", interval_s: float = 5.0):
        self.title, self.unit, self.interval_s = title, unit, interval_s
        self._bar: Any = None
        self._task: Any = None
        self._first: tuple[float, float] | None = None
        self._last_line = 0.0

    def __enter__(self) -> "ProgressLine":
        if sys.stderr.isatty():
            self._bar = self._make_bar()
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, total: float, current: str = "") -> None:
        """Tell that `done` of `total` is finished and `current` is in work."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._last_line = (now, done), now
        if self._bar is not None:
            self._update_bar(done, total, current)
        elif done >= total or now - self._last_line >= self.interval_s:
            self._last_line = now
            note(self._line(done, total, now))

    def _make_bar(self) -> Any:
        from rich import progress
        from rich.table import Column

        counted: list[progress.ProgressColumn] = [progress.MofNCompleteColumn()]
        if self.unit == "bytes":
            counted = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            *counted,
            progress.TimeRemainingColumn(),
            progress.TextColumn("[dim]{task.fields[current]}", table_column=Column(width=30, no_wrap=True)),
            console=console(stderr=True),
            transient=True,
        )

    def _update_bar(self, done: float, total: float, current: str) -> None:
        if self._task is None:
            self._task = self._bar.add_task(self.title, total=total, completed=done, current="")
        self._bar.update(self._task, completed=done, total=total, current=_shortened(current))

    def _line(self, done: float, total: float, now: float) -> str:
        share = f"{100 * done / total:.0f} %" if total else "100 %"
        started, first = self._first or (now, done)
        rate = (done - first) / (now - started) if now > started else 0.0
        if self.unit == "bytes":
            counted, speed = f"{decimal(done)} of {decimal(total)}", f"{decimal(rate)}/s"
        else:
            counted, speed = f"{done:g} of {total:g} {self.unit}", f"{rate:.2g} {self.unit}/s"
        known = done - first >= total / 100  # before that, a few small tensors would tell of weeks
        left = f", {duration((total - done) / rate)} left" if known and rate > 0 and done < total else ""
        return f"{self.title}: {counted} ({share}), {speed}{left}"


def _shortened(name: str) -> str:
    return name.removeprefix("model.").replace("block_sparse_moe.", "").removesuffix(".weight")
