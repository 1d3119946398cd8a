"""The matrices of a layer: read, solved or rounded, and put to use just as the file will hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minibble.calibrate.hessian import Hessians
from minibble.calibrate.setup import Setup
from minibble.calibrate.solver import solve
from minibble.quantize.errors import CalibrationError, CheckpointError
from minibble.quantize.measure import all_finite, relative_error
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import prepare
from minibble.runtime.layers import Linear
from minibble.runtime.layout import by_module
from minibble.runtime.model import Layer

Tensors = Mapping[str, Tensor | QuantizedTensor]


@dataclass(frozen=True)
class Settled:
    """A matrix as it is stored, and what the manifest tells about it; no record where it was read back."""

    q: QuantizedTensor
    record: dict[str, Any] | None = None


class LayerMatrices:
    """The modules of layer `index`, empty at first; `layer` runs once they hold their matrices."""

    def __init__(self, setup: Setup, index: int):
        self.setup, self.index = setup, index
        self.layer = Layer(setup.config, index).eval().requires_grad_(False)
        prefix = f"layers.{index}."
        self.names = {
            module.removeprefix(prefix): names for module, names in by_module(setup.config) if module.startswith(prefix)
        }

    def hold_plain(self, module: str, tensors: Tensors) -> None:
        """Give a norm or the router its weight, float32."""
        [name] = self.names[module]
        weight = tensors[name]
        assert isinstance(weight, Tensor)
        self._check_finite(name, weight)
        weight = weight.to(self.setup.device, torch.float32)
        self.layer.get_submodule(module).weight = nn.Parameter(weight, requires_grad=False)

    def read_back(self, module: str, tensors: Tensors) -> dict[str, Settled] | None:
        """Hold matrices that are 4-bit already; None if they are still to be solved."""
        parts = [tensors[name] for name in self.names[module]]
        packed = [part for part in parts if isinstance(part, QuantizedTensor)]
        if not packed:
            return None
        assert len(packed) == len(parts)
        self._hold(module, packed)
        return {name: Settled(q) for name, q in zip(self.names[module], packed, strict=True)}

    def solve(
        self, modules: Sequence[str], hessians: Hessians, tensors: Tensors, notes: Sequence[dict[str, Any]]
    ) -> dict[str, Settled]:
        """Solve modules of one shape together, each with its Hessian, and hold them; `notes` go into the records."""
        if not modules:
            return {}
        broken = hessians.first_broken()
        if broken is not None:
            raise CalibrationError(
                f"layer {self.index}: {self.names[modules[broken]][0]} receives NaN or infinite activations; "
                "check the source with `minibble verify`"
            )
        W_BKN, rows, dtype = self._stacked(modules, tensors)
        try:
            solved = solve(W_BKN, hessians.sum_BKK, rows, self.setup.format, self.setup.solver, dtype)
        except CalibrationError as error:
            raise CalibrationError(f"layer {self.index}: {self.names[modules[0]][0]} and its like: {error}") from error
        settled = {}
        for module, tokens, parts, more in zip(modules, hessians.tokens, solved, notes, strict=True):
            for name, part in zip(self.names[module], parts, strict=True):
                record = {
                    "relative_error": part.relative_error,
                    "output_error": part.output_error,
                    "tokens": tokens,
                    "damp": part.damp,
                }
                settled[name] = Settled(part.q, record | more)
            self._hold(module, [part.q for part in parts])
        return settled

    def round(self, module: str, tensors: Tensors, notes: dict[str, Any]) -> dict[str, Settled]:
        """Round a module's matrices to nearest, and hold them; `notes` say why."""
        settled = {}
        for name, weight in zip(self.names[module], self._sources(module, tensors), strict=True):
            self._check_finite(name, weight)
            q = self.setup.format.encode(weight)
            settled[name] = Settled(q, {"relative_error": relative_error(self.setup.format, weight, q)} | notes)
        self._hold(module, [one.q for one in settled.values()])
        return settled

    def release(self, module: str) -> None:
        """Let go of a module's matrices."""
        linear = self.layer.get_submodule(module)
        assert isinstance(linear, Linear)
        linear.packed = None

    def _sources(self, module: str, tensors: Tensors) -> list[Tensor]:
        """The 16-bit matrices of a module, on the device."""
        parts = [tensors[name] for name in self.names[module]]
        return [part.to(self.setup.device, non_blocking=True) for part in parts if isinstance(part, Tensor)]

    def _stacked(self, modules: Sequence[str], tensors: Tensors) -> tuple[Tensor, list[int], torch.dtype]:
        """The modules' weights column after column, float32 [B, K, N]; rows of each part, and the source's dtype."""
        first = [tensors[name] for name in self.names[modules[0]]]
        rows, K = [part.shape[0] for part in first], first[0].shape[1]
        W_BKN = torch.empty(len(modules), K, sum(rows), device=self.setup.device)
        for module, W_KN in zip(modules, W_BKN, strict=True):
            parts = zip(self.names[module], self._sources(module, tensors), W_KN.split(rows, dim=1), strict=True)
            for name, source, part in parts:
                self._check_finite(name, source)
                part.copy_(source.t())
                dtype = source.dtype
        return W_BKN, rows, dtype

    def _check_finite(self, name: str, weight: Tensor) -> None:
        if not all_finite(weight):
            raise CheckpointError(f"{self.setup.where(name)} has NaN or infinite values; download the source again")

    def _hold(self, module: str, parts: list[QuantizedTensor]) -> None:
        linear = self.layer.get_submodule(module)
        assert isinstance(linear, Linear)
        linear.set_packed(prepare([q.to(self.setup.device) for q in parts], self.setup.device, self.setup.dtype))
