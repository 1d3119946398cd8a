"""What the kernels of `asking.cu` do, in torch on the CPU, where the host's memory is the device's."""

import torch
from torch import Tensor

from minibble.runtime.kernels.moe4 import asking


def ask(
    box: asking.Mailbox, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, able_E: Tensor, whole: int, left: int
) -> None:
    """What the kernel does."""
    alone = (ids_MA[..., None] == ids_MA.flatten()).sum(-1) == 1
    box.left.copy_(torch.where(alone & able_E[ids_MA.long()].bool(), left, whole))
    for place, value in ((box.ids, ids_MA), (box.units, box.left), (box.weights, weights_MA), (box.y, y_MD)):
        place.copy_(value)
    box.turn[0] += 1
    box.turn[1] = (box.left < whole).any()
    box.words[0] = 2 * box.turn[0] + box.turn[1]


def receive(box: asking.Mailbox) -> Tensor:
    """What the kernel does, for which there must be an answer already."""
    assert not box.turn[1] or box.words[1] == box.turn[0]
    box.extra.copy_(box.answer if box.turn[1] else torch.zeros(()))
    return box.extra
