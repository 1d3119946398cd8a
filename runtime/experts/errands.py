"""Parts of missing experts that the CPU computes while the GPU reads the rest of them in place.

A layer posts what it chose in host memory and goes on; the host, which has issued the step, looks there, computes and
answers; before the layer's sum the GPU waits for that. So a step remains one graph a GPU.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from minibble.runtime.experts.lanes import Lane
from minibble.runtime.experts.processor import Processor
from minibble.runtime.experts.tiering import Key
from minibble.runtime.kernels.moe4 import asking
from minibble.runtime.kernels.nvrtc import KernelError

_LOOKS = 1 << 14  # for a question, until the host asks whether the device works at all: some milliseconds


class Errands:
    """What the CPU does for one device: parts of experts of which `processor` has the last of `whole` hidden units.

    `computed` counts them.
    """

    def __init__(self, device: torch.device, lane: Lane, processor: Processor, whole: int, experts: int):
        self.device, self.lane, self.processor, self.whole, self.computed = device, lane, processor, whole, 0
        layers = {layer for layer, _ in processor.keys}
        self.able = {layer: _marked(processor.keys, layer, experts, device) for layer in layers}
        self._errands: dict[tuple[int, int], Errand] = {}

    @property
    def share(self) -> float:
        """Of an expert that is divided, the CPU's part."""
        return self.processor.units / self.whole

    def ask(self, layer: int, y_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> "Errand | None":
        """Post what a layer chose; None if the CPU has nothing of its experts."""
        if layer not in self.able:
            return None
        (M, A), D = ids_MA.shape, y_MD.shape[1]
        if (layer, M) not in self._errands:  # by the first step, which is not captured
            self._errands[layer, M] = Errand(self, layer, asking.Mailbox(M, A, D, self.device))
        errand, left = self._errands[layer, M], self.whole - self.processor.units
        asking.ask(errand.box, y_MD, ids_MA.contiguous(), weights_MA.contiguous(), self.able[layer], self.whole, left)
        return errand

    def give_up(self) -> None:
        """Let the device go on without the answers that it still waits for, and wait until it is done."""
        for errand in self._errands.values():
            errand.box.words[1] = -1
        self.lane.finish()
        for errand in self._errands.values():
            words = errand.box.words
            errand.seen, words[1] = int(words[0]) >> 1, 0


class Errand:
    """A pause that does not end a stretch: its graph goes on, up to where it waits for the answer."""

    ends = False

    def __init__(self, errands: Errands, layer: int, box: asking.Mailbox):
        self.errands, self.layer, self.box, self.device, self.seen = errands, layer, box, errands.device, 0
        self._words = box.words.numpy()  # the same memory, which torch takes microseconds to look at

    @property
    def left(self) -> Tensor:
        """How many hidden units of each pair the device is to compute, int32 [M, A]."""
        return self.box.left

    def receive(self) -> Tensor:
        """Let the device wait; what is to be added to its part, float32 [1, M, D]."""
        return asking.receive(self.box)

    def prepare(self) -> None: ...

    def run(self) -> None:
        """Wait for the question and answer it."""
        if self._asked():
            self._compute()
            self._words[1] = self.seen

    def _asked(self) -> bool:
        """Whether the next question, for which the host waits, asks for anything."""
        looks, lane = 0, self.errands.lane
        while (posted := int(self._words[0])) >> 1 == self.seen:
            looks += 1
            if looks % _LOOKS == 0 and lane.passed(lane.mark()) and int(self._words[0]) == posted:
                raise KernelError(f"{self.device}: layer {self.layer} of a decode step did not ask for its experts")
        self.seen = posted >> 1
        return bool(posted & 1)

    def _compute(self) -> None:
        box, errands = self.box, self.errands
        box.answer.zero_()
        for pair, (expert, units) in enumerate(
            zip(box.ids.flatten().tolist(), box.units.flatten().tolist(), strict=True)
        ):
            if units < errands.whole:
                token, slot = divmod(pair, box.ids.shape[1])
                part = errands.processor((self.layer, expert), box.y[token : token + 1])[0]
                box.answer[token] += box.weights[token, slot] * part
                errands.computed += 1


def _marked(keys: Collection[Key], layer: int, experts: int, device: torch.device) -> Tensor:
    """1 for those of a layer's experts that are among `keys`, uint8 [E]."""
    return torch.tensor([(layer, expert) in keys for expert in range(experts)], dtype=torch.uint8, device=device)
