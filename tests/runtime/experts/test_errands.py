"""What the host does about questions from the device: answers in order, and what happens where there are none."""

from collections.abc import Iterator

import pytest
import torch
from golden import asked
from golden.expert_stores import CPU
from torch import Tensor

from minibble.quantize.nf4 import NF4
from minibble.runtime.experts.division import made_up
from minibble.runtime.experts.errands import Errand, Errands
from minibble.runtime.experts.lanes import HostLane
from minibble.runtime.kernels.moe4 import asking
from minibble.runtime.kernels.nvrtc import KernelError

D, WHOLE, UNITS, EXPERTS = 128, 1024, 256, 40


@pytest.fixture
def errands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Errands]:
    """Of layer 0, for its first experts."""
    monkeypatch.setattr(asking, "ask", asked.ask)
    monkeypatch.setattr(asking, "receive", asked.receive)
    yield Errands(CPU, HostLane(), made_up(D, UNITS, NF4()), WHOLE, EXPERTS)


def ask(errands: Errands, ids: list[list[int]]) -> tuple[Errand, Tensor, Tensor]:
    y = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = torch.arange(1.0, 1 + 2 * len(ids)).view(-1, 2) / 8
    errand = errands.ask(0, y, torch.tensor(ids, dtype=torch.int32), weights)
    assert errand is not None
    return errand, y, weights


def test_experts_that_one_token_chose_are_answered(errands: Errands) -> None:
    able = int(errands.able[0].sum())
    assert 3 < able < EXPERTS - 1
    for ids in ([[1, 2]], [[1, EXPERTS - 1]], [[3, 2], [2, 0]]):
        before = errands.computed
        errand, y, weights = ask(errands, ids)
        flat = [expert for row in ids for expert in row]
        mine = [expert < able and flat.count(expert) == 1 for expert in flat]
        assert errand.left.flatten().tolist() == [WHOLE - UNITS if own else WHOLE for own in mine]
        errand.run()
        right = torch.zeros(len(ids), D)
        for pair, own in enumerate(mine):
            if own:
                token, slot = divmod(pair, 2)
                part = errands.processor((0, flat[pair]), y[token : token + 1])[0]
                right[token] += weights[token, slot] * part
        torch.testing.assert_close(errand.receive()[0], right)
        assert errands.computed - before == sum(mine)


def test_layers_of_which_the_cpu_has_nothing_do_not_ask(errands: Errands) -> None:
    given = torch.zeros(1, D).bfloat16(), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2)
    assert errands.ask(1, *given) is None


def test_a_question_that_never_comes(errands: Errands) -> None:
    """The device is done, and has not asked: a step that was not launched, or a kernel that went wrong."""
    errand, _, _ = ask(errands, [[0, 1]])
    errand.run()
    with pytest.raises(KernelError, match="layer 0 of a decode step did not ask"):
        errand.run()


def test_questions_that_are_given_up(errands: Errands) -> None:
    """Nobody waits for an answer any more, and the next question is a new one."""
    seen: list[int] = []

    class Lane(HostLane):
        def finish(self) -> None:
            seen.append(int(errand.box.words[1]))

    errands.lane = Lane()
    errand, _, _ = ask(errands, [[0, 1]])
    errands.give_up()
    assert seen == [-1] and int(errand.box.words[1]) == 0
    with pytest.raises(KernelError):
        errand.run()
    again, y, weights = ask(errands, [[0, 1]])
    assert again is errand
    errand.run()
    right = sum(weights[0, slot] * errands.processor((0, slot), y)[0] for slot in (0, 1))
    torch.testing.assert_close(errand.receive()[0, 0], right)
