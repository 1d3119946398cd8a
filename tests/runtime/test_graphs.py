"""Stretches of a decode step as graphs: what is captured together, and in what order pauses are made. Without a GPU."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden.tiny_models import make as make_model
from torch import Tensor

from minibble.runtime import graphs
from minibble.runtime.graphs import Bound
from minibble.runtime.state import HybridState

FIRST, SECOND = torch.device("meta", 0), torch.device("meta", 1)
log: list[str] = []


class Graph:
    """Says when it is captured and replayed."""

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        log.append(f"begin {pool}")
        self.pool = pool

    def capture_end(self) -> None:
        log.append(f"end {self.pool}")

    def replay(self) -> None:
        log.append(f"replay {self.pool}")


class Part:
    """A pause."""

    def __init__(self, name: str, device: torch.device, ends: bool):
        self.name, self.device, self.ends, self.fails = name, device, ends, False

    def prepare(self) -> None:
        log.append(f"prepare {self.name}")

    def run(self) -> None:
        log.append(self.name)
        if self.fails:
            raise KeyboardInterrupt


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """Those of a step on two devices: the host helps twice on the first and once on the second, where experts come."""
    parts = [
        Part("help 0", FIRST, False), Part("help 1", FIRST, False), Part("hop", SECOND, True),
        Part("help 2", SECOND, False), Part("fetch", SECOND, True),
    ]  # fmt: skip

    def stretches(*given: Any) -> Iterator[Part]:
        for part in parts:
            log.append(f"launches before {part.name}")
            yield part
        return torch.zeros(1, 7)

    log.clear()
    monkeypatch.setattr(graphs, "stretches", stretches)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return parts


def bound() -> tuple[Bound, Any, HybridState]:
    model: Any = make_model()
    state = HybridState(model.minibble, reserve=4)
    made = Bound(model.decoder, model, state, 1)
    model.__dict__["stores"] = [
        SimpleNamespace(give_up=lambda: log.append("give up"), used_all=lambda: log.append("used"))
    ]
    return made, model, state


def captured(monkeypatch: pytest.MonkeyPatch) -> tuple[Bound, Any, HybridState]:
    made, model, state = bound()
    monkeypatch.setattr(type(model), "device", FIRST)
    made.capture(model, state, {FIRST: "first", SECOND: "second"})
    return made, model, state


def test_a_graph_ends_where_a_pause_does(parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, _ = captured(monkeypatch)
    assert [stretch.device for stretch in made.graphs] == [FIRST, SECOND, SECOND]
    assert [[part.name for part in stretch.pauses] for stretch in made.graphs] == [
        ["help 0", "help 1", "hop"], ["help 2", "fetch"], [],
    ]  # fmt: skip
    launches = [f"launches before {part.name}" for part in parts]
    assert log == [
        "begin first", *launches[:3], "end first", "prepare hop", "begin second", *launches[3:], "end second",
        "prepare fetch", "begin second", "end second",
    ]  # fmt: skip


def test_the_host_helps_after_the_launch(parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    made, model, state = captured(monkeypatch)
    log.clear()
    assert isinstance(made.run(model, state), Tensor)
    assert log == [
        "replay first", "help 0", "help 1", "hop", "replay second", "help 2", "fetch", "replay second", "used",
    ]  # fmt: skip


def test_a_step_that_ends_early_leaves_nobody_waiting(parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    made, model, state = captured(monkeypatch)
    log.clear()
    parts[1].fails = True
    with pytest.raises(KeyboardInterrupt):
        made.run(model, state)
    assert log == ["replay first", "help 0", "help 1", "give up", "used"]
