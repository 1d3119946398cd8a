"""What a layer asks of the host in the middle of a step: on the GPU, and compiled for the CPU."""

import ctypes
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import emulated
from torch import Tensor

from minibble.runtime.kernels.moe4 import asking
from minibble.runtime.kernels.moe4.asking import Mailbox

D, EXPERTS, WHOLE, LEFT = 2048, 32, 1024, 768


class Emulated:
    """A kernel as `nvrtc.Kernel`, but for the CPU."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def launch(self, grid: int, threads: int, arguments: Any, overlap: bool = False) -> None:
        library = emulated.library(
            asking._SOURCES, (), self.folder, replaced=("asking_ptx.cuh",), headers=("cuda.h", "asking.h"),
            entry="asking.cpp",
        )  # fmt: skip
        seed = next(emulated.SEEDS)
        if self.name == "ask":
            library.launch_ask(threads, seed, ctypes.byref(arguments[0]))
        else:
            turn, answered, answer, out, vectors = arguments
            places = (
                ctypes.c_void_p(place) for place in (turn.data_ptr(), answered.value, answer.data_ptr(), out.data_ptr())
            )
            library.launch_receive(grid, threads, seed, *places, vectors)


def given(M: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(M, D, generator=generator).bfloat16()
    ids = torch.randint(EXPERTS, (M, 2), generator=generator, dtype=torch.int32)
    return y.to(device), ids.to(device), torch.rand(M, 2, generator=generator).to(device)


def check_question(M: int, device: torch.device) -> None:
    """The host's are experts of one pair alone that it is able to compute; the tokens come if there are any."""
    box, able = Mailbox(M, 2, D, device), (torch.arange(EXPERTS) % 3 == 0).to(torch.uint8)
    for turn in range(1, 6):
        y, ids, weights = given(M, turn, device)
        if turn == 4:
            able = torch.zeros_like(able)
        before = box.y.clone()
        asking.ask(box, y, ids, weights, able.to(device), WHOLE, LEFT)
        synchronize(device)
        chosen = ids.cpu()
        alone = (chosen[..., None] == chosen.flatten()).sum(-1) == 1
        asked = alone & able[chosen.long()].bool()
        assert torch.equal(box.units, torch.where(asked, LEFT, WHOLE)) and torch.equal(box.units, box.left.cpu())
        assert torch.equal(box.ids, chosen) and torch.equal(box.weights, weights.cpu())
        assert torch.equal(box.y, y.cpu() if asked.any() else before)
        assert int(box.words[0]) == 2 * turn + int(asked.any())


def check_answer(device: torch.device) -> None:
    """Zeros where nothing was asked, and then nobody waits."""
    box, able = Mailbox(3, 2, D, device), torch.ones(EXPERTS, dtype=torch.uint8, device=device)
    y, ids, weights = given(3, 0, device)
    asking.ask(box, y, ids, weights, 0 * able, WHOLE, LEFT)
    box.answer.fill_(float("nan"))
    assert not asking.receive(box).any()
    waiting = False
    for turn in (2, 3):
        asking.ask(box, y, ids, weights, able, WHOLE, LEFT)
        if device.type == "cuda":  # the GPU waits already
            asking.receive(box)
            time.sleep(0.02)
            waiting = not torch.cuda.current_stream().query()
        box.answer.copy_(torch.arange(3 * D).view(3, D) * turn)
        box.words[1] = turn
        extra = box.extra if device.type == "cuda" else asking.receive(box)
        synchronize(device)
        assert torch.equal(extra.cpu()[0], box.answer) and (waiting or device.type == "cpu")
    asking.ask(box, y, ids, weights, able, WHOLE, LEFT)
    box.words[1] = -1  # no answer will come
    asking.receive(box)
    synchronize(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.skipif(not emulated.available(), reason="no C++ compiler")
def test_emulated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("asking")
    monkeypatch.setattr(asking, "_kernel", lambda name: Emulated(name, folder))
    for M in (1, 3, 40):
        check_question(M, torch.device("cpu"))
    check_answer(torch.device("cpu"))


@pytest.mark.gpu
def test_cuda(cuda_device: torch.device) -> None:
    for M in (1, 3, 40, 64):
        check_question(M, cuda_device)
    check_answer(cuda_device)
