"""Decode steps as CUDA graphs: who may take one, when it is captured, and how long it lives.

A graph reads and writes fixed places in memory, so it belongs to the state whose tensors these are
(`HybridState.bound`) and goes when they move or the state is dropped. docs/adr/0008-decode-graphs.md says why.
"""

import gc
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minibble.runtime.decode import Inputs, decode_step, stretches, unfused
from minibble.runtime.kernels import reference_forced
from minibble.runtime.masks import attention_mask_2d
from minibble.runtime.pipeline import Pause
from minibble.runtime.state import HybridState

if TYPE_CHECKING:
    from minibble.runtime.model import MiniMaxForCausalLM

MAX_BATCH = 64  # sequences; what the kernels for few tokens are made for
MAX_GRAPHS = 16  # of a model at a time; one of 80 layers has some 800 launches
IDLE_STEPS = 64  # a graph that has not been used for so many steps may make room for another

# One thread at a time issues steps: what another one launched on the stream meanwhile would end up in its graph.
_LOCK = threading.Lock()


class Decoder:
    """Takes the decode steps of one model that it can; `taken` counts them.

    `max_batch` is the largest number of sequences it takes. Keys of `taken`: "graph" (replayed), "eager" (the same
    launches one by one: the first step over new tensors, which also warms up), or why the ordinary path was left to
    go through the layers.
    """

    def __init__(self, max_batch: int = MAX_BATCH):
        self.max_batch = max_batch
        self.taken: Counter[str] = Counter()
        self._steps = 0
        self._pools: dict[torch.device, Any] = {}
        self._failed = False
        self._unfused: str | None = ""  # "" where nobody has looked yet
        self._bound: weakref.WeakSet[Bound] = weakref.WeakSet()
        weakref.finalize(self, _release, self._bound).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {"max_batch": self.max_batch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def reset(self) -> None:
        """Drop all graphs and look at the model anew: its weights were moved or replaced."""
        _release(self._bound)
        self._unfused, self._failed = "", False

    def step(
        self,
        model: "MiniMaxForCausalLM",
        ids_B1: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: HybridState,
    ) -> Tensor | None:
        """Logits, float32 [B, 1, V], after one more token of each sequence; None where the ordinary path must do it.

        As in the model's `forward`; `state` moves on.
        """
        why = self._refusal(model, ids_B1, state)
        valid = state.valid
        if why is None and attention_mask is not None:
            mask = attention_mask_2d(attention_mask, state.length, ids_B1, valid)
            valid = None if mask is None else mask[:, :-1]
            if mask is not None and not bool(mask[:, -1].all()):
                why = "padding among the new tokens"
        if why is not None:
            self.taken[why] += 1
            return None
        with torch.inference_mode(), _LOCK:
            return self._run(model, ids_B1, valid, position_ids, state)

    def _refusal(self, model: "MiniMaxForCausalLM", ids_B1: Tensor, state: HybridState) -> str | None:
        if reference_forced():
            return "MINIBBLE_KERNELS=reference"
        if self._unfused == "":
            self._unfused = unfused(model)
        if self._unfused is not None:
            return self._unfused
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if ids_B1.shape[0] > self.max_batch:
            return f"more than {self.max_batch} sequences"
        if not self._knows(state, ids_B1) and not state.suits(ids_B1.shape[0], model.dtype, _layer_devices(model)):
            return "a state of another batch, device or dtype"
        return None

    def _run(
        self,
        model: "MiniMaxForCausalLM",
        ids_B1: Tensor,
        valid: Tensor | None,
        position_ids: Tensor | None,
        state: HybridState,
    ) -> Tensor:
        past = state.length
        state.make_room(1)
        if not self._knows(state, ids_B1):
            state.bound = Bound(self, model, state, ids_B1.shape[0])
            self._bound.add(state.bound)
        bound = state.bound
        self._steps += 1
        bound.used = self._steps
        with state.taking(), _beside(bound.devices):
            bound.fill(ids_B1, position_ids, past, valid)
            if not bound.graphs and bound.warm and self._may_capture(model):
                self._capture(bound, model, state)
            self.taken["graph" if bound.graphs else "eager"] += 1
            logits = bound.run(model, state)
            logits = logits.to(ids_B1.device, copy=True)  # the next replay writes to the same place
            state.advance(1, bound.seen(past, valid))
        return logits[:, None]

    def _knows(self, state: HybridState, ids_B1: Tensor) -> bool:
        """True if the state's tensors are those of an earlier step."""
        bound = state.bound
        return isinstance(bound, Bound) and bound.decoder() is self and bound.inputs.ids.shape == ids_B1.shape[:1]

    def _may_capture(self, model: "MiniMaxForCausalLM") -> bool:
        """True if there may be one more graph; the one unused the longest goes for it if it is idle."""
        if model.device.type != "cuda" or self._failed:
            return False
        held = self._captured()
        if len(held) < MAX_GRAPHS:
            return True
        oldest = min(held, key=lambda bound: bound.used)
        if self._steps - oldest.used <= IDLE_STEPS:
            return False
        oldest.release()
        return True

    def _captured(self) -> "list[Bound]":
        """Those with a graph; all work in one pool of memory, since they never run at the same time."""
        return [bound for bound in self._bound if bound.graphs]

    def _capture(self, bound: "Bound", model: "MiniMaxForCausalLM", state: HybridState) -> None:
        if not self._captured():  # a pool goes with its last graph
            self._pools = {device: torch.cuda.graph_pool_handle() for device in bound.devices}
        try:
            bound.capture(model, state, self._pools)
        except RuntimeError as error:
            self._failed = True
            warnings.warn(f"decode steps could not be captured and go launch by launch: {error}", stacklevel=2)


class Stretch(NamedTuple):
    """A graph on a device, and the pauses that are made in it and after it once it has been launched."""

    device: torch.device
    graph: torch.cuda.CUDAGraph
    pauses: list[Pause]


class Bound:
    """What a decode step over one state's tensors reads and writes, and its graphs once captured, one a stretch."""

    def __init__(self, decoder: Decoder, model: "MiniMaxForCausalLM", state: HybridState, batch: int):
        self.decoder = weakref.ref(decoder)
        self.inputs = Inputs.empty(model, batch, state.capacity)
        self.devices = list(self.inputs.on)
        self.graphs: list[Stretch] = []
        self.logits: Tensor | None = None
        self.warm = False
        self.used = 0
        self._valid: Tensor | None = None  # the view of the mask that the state holds, if there is padding

    def fill(self, ids_B1: Tensor, position_ids: Tensor | None, past: int, valid: Tensor | None) -> None:
        """Put in the new tokens; `valid` [B, past] is False at padding before them."""
        positions: Tensor | None = None
        if position_ids is not None:
            positions = position_ids.reshape(-1, position_ids.shape[-1])[:, -1]
        elif valid is not None:
            positions = valid.sum(1)
        self.inputs.put(ids_B1[:, 0], past, positions)
        if valid is not self._valid:
            for places in self.inputs.on.values():
                places.valid.fill_(True)
                if valid is not None:
                    places.valid[:, :past] = valid

    def seen(self, past: int, valid: Tensor | None) -> Tensor | None:
        """The mask of all tokens with those put in last, [B, past + 1], once they are in the state; None where there is
        no padding."""
        self._valid = None if valid is None else self.inputs.on[self.inputs.ids.device].valid[:, : past + 1]
        return self._valid

    def run(self, model: "MiniMaxForCausalLM", state: HybridState) -> Tensor:
        """Logits, float32 [B, V]; they are overwritten by the next run."""
        if not self.graphs:
            logits, self.warm = decode_step(model, self.inputs, state), True
            return logits
        with model.using_experts():
            for stretch in self.graphs:
                with torch.cuda.device(stretch.device):
                    stretch.graph.replay()
                for pause in stretch.pauses:
                    pause.run()
        assert self.logits is not None
        return self.logits

    def capture(self, model: "MiniMaxForCausalLM", state: HybridState, pools: dict[torch.device, Any]) -> None:
        """Record the step, which has been run before, on the current streams; nothing is computed yet."""
        steps, device = stretches(model, self.inputs, state), model.device
        graphs: list[Stretch] = []
        logits: Tensor | None = None
        with _no_collection():
            while logits is None:
                stretch = Stretch(device, torch.cuda.CUDAGraph(), [])
                # Other threads may go on using the device, as a streamer's does.
                with torch.cuda.device(device):
                    stretch.graph.capture_begin(pool=pools[device], capture_error_mode="thread_local")
                    try:
                        while not (stretch.pauses and stretch.pauses[-1].ends):
                            stretch.pauses.append(next(steps))
                    except StopIteration as end:
                        logits = end.value
                    finally:
                        stretch.graph.capture_end()
                graphs.append(stretch)
                if logits is None:
                    stretch.pauses[-1].prepare()
                    device = stretch.pauses[-1].device
        self.graphs, self.logits = graphs, logits

    def release(self) -> None:
        """Give back the graphs' memory; the next steps capture them again."""
        self.graphs, self.logits = [], None


def _release(bound: "weakref.WeakSet[Bound]") -> None:
    for one in bound:
        one.release()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: it may free what must not be freed during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _beside(devices: list[torch.device]) -> Iterator[None]:
    """On the devices' streams for decode steps, after what was issued before and before what comes after.

    The default stream cannot be captured, and steps of several threads must not run at once in one pool of memory.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    callers = [torch.cuda.current_stream(device) for device in gpus]
    with ExitStack() as stack:
        for device, caller in reversed(list(zip(gpus, callers, strict=True))):  # the first is then the current device
            _stream(device).wait_stream(caller)
            stack.enter_context(torch.cuda.stream(_stream(device)))
        try:
            yield
        finally:  # after an error, too: what the step was given may be freed, and it may still be running
            for device, caller in zip(gpus, callers, strict=True):
                caller.wait_stream(_stream(device))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _layer_devices(model: "MiniMaxForCausalLM") -> list[torch.device]:
    return [layer.device for layer in model.layers]
