"""What a layer on the GPU asks of the host in the middle of a graph, and how it waits for the answer: `asking.cu`.

Nothing is launched in between, so a step remains one graph. M tokens, A experts chosen for each, D hidden, E experts.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.kernels.nvrtc import Kernel

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("asking_ptx.cuh", "asking.cu"))
_THREADS = 256


class _Question(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "weights", "y", "able", "units", "turn")),
        *((name, ctypes.c_void_p) for name in ("host_ids", "host_units", "host_weights", "host_y", "posted")),
        *((name, ctypes.c_int) for name in ("pairs", "vectors", "whole", "left")),
    ]  # fmt: skip


class Mailbox:
    """Where one layer and the host write to each other, always in the same places.

    In host memory, which the device must reach: `ids`, `units`, int32 [M, A], `weights`, float32 [M, A], and `y`,
    bfloat16 [M, D], of the question; `answer`, float32 [M, D]; `words`, int32 [2], the last question's number and the
    last answer's. On the device: `left`, int32 [M, A], hidden units that the kernels are to compute; `turn`, int32
    [2], the last question's number and whether it asked for anything; `extra`, float32 [1, M, D], what is to be added.
    """

    def __init__(self, M: int, A: int, D: int, device: torch.device):
        pinned = device.type == "cuda"
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside it
            self.ids, self.units = (torch.zeros(M, A, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
            self.weights = torch.zeros(M, A, pin_memory=pinned)
            self.y = torch.zeros(M, D, dtype=torch.bfloat16, pin_memory=pinned)
            self.answer = torch.zeros(M, D, pin_memory=pinned)
            self.words = torch.zeros(2, dtype=torch.int32, pin_memory=pinned)
            self.left = torch.zeros(M, A, dtype=torch.int32, device=device)
            self.turn = torch.zeros(2, dtype=torch.int32, device=device)
            self.extra = torch.zeros(1, M, D, device=device)


def ask(box: Mailbox, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor, able_E: Tensor, whole: int, left: int) -> None:
    """Post a question: of each expert that one token alone chose and whose `able`, uint8, is 1, the host is to compute
    all but the first `left` of `whole` hidden units."""
    assert ids_MA.dtype == torch.int32 and weights_MA.dtype == torch.float32 and y_MD.dtype == torch.bfloat16
    assert able_E.dtype == torch.uint8 and ids_MA.shape == weights_MA.shape == box.ids.shape
    assert all(given.is_contiguous() for given in (y_MD, ids_MA, weights_MA, able_E)) and y_MD.shape == box.y.shape
    vectors, rest = divmod(y_MD.nbytes, 16)
    assert not rest and y_MD.data_ptr() % 16 == 0
    places = ids_MA, weights_MA, y_MD, able_E, box.left, box.turn, box.ids, box.units, box.weights, box.y, box.words
    question = _Question(*(place.data_ptr() for place in places), ids_MA.numel(), vectors, whole, left)
    with torch.cuda.device_of(y_MD):
        _kernel("ask").launch(1, _THREADS, [question], overlap=True)


def receive(box: Mailbox) -> Tensor:
    """Let the device wait for the answer and take it: `extra`, zeros where nothing was asked."""
    vectors = box.answer.nbytes // 16
    answered = ctypes.c_longlong(box.words.data_ptr() + box.words.element_size())
    with torch.cuda.device_of(box.extra):
        _kernel("receive").launch(
            -(-vectors // _THREADS), _THREADS, (box.turn, answered, box.answer, box.extra, vectors), overlap=True
        )
    return box.extra


@cache
def _kernel(name: str) -> Kernel:
    return Kernel(name, _SOURCES)
