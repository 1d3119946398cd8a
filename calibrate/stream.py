"""All layers one after the other: their weights read ahead in groups, their matrices solved, the text run on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from minibble.calibrate.layer import LayerPass
from minibble.calibrate.matrices import Settled, Tensors
from minibble.calibrate.setup import Setup
from minibble.calibrate.stores import Stores, spans
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.formats import Format
from minibble.quantize.inventory import EMBEDDING, TensorSpec, quantized_roles
from minibble.quantize.nf4_math import decode_rows
from minibble.quantize.prefetch import ahead
from minibble.quantize.safetensors_file import TensorReader, read_header
from minibble.quantize.tensors import QuantizedTensor

Read = Callable[[TensorSpec], Tensor | QuantizedTensor]


@dataclass(frozen=True)
class LayerReport:
    """A layer just solved: its number of all `layers`, mean output error, tokens of each expert, and time taken."""

    index: int
    layers: int
    output_error: float
    expert_tokens: list[int]
    fallbacks: int
    elapsed_s: float


@dataclass(frozen=True)
class _Group:
    """Tensors of a layer that are read together: all but the experts (`experts` is empty), or some experts'."""

    layer: int
    experts: range
    specs: tuple[TensorSpec, ...]
    last: bool


def finished_reader(paths: list[Path], format: Format) -> Read:
    """Reads 4-bit matrices from the shards `paths` of an output that is not whole yet."""
    entries = {name: (path, entry) for path in paths for name, entry in read_header(path).entries.items()}
    reader = TensorReader()

    def read(spec: TensorSpec) -> QuantizedTensor:
        shape = (spec.shape[0], spec.shape[1])
        return format.unpack(spec.name, shape, lambda name: reader.read(*entries[name]))

    return read


class LayerStream:
    """The layers of `source` from the first to the last of `to_solve`.

    Other layers are finished: `read_finished` gives their matrices, and they only take the text on.
    """

    def __init__(
        self, setup: Setup, source: Checkpoint, read: Read, read_finished: Read, to_solve: set[int],
        on_layer: Callable[[LayerReport], None] | None,
    ):  # fmt: skip
        self.setup, self.source, self.to_solve, self.on_layer = setup, source, to_solve, on_layer
        self._read_source, self._read_finished = read, read_finished

    def run(self, ids: Tensor, stores: Stores) -> Iterator[tuple[TensorSpec, Tensor | QuantizedTensor | Settled]]:
        """Every tensor of the layers to solve, in the order of files; `ids` int64 [samples, seq_len]."""
        self._embed(ids.reshape(-1), stores)
        begun = time.monotonic()
        settled: dict[str, Settled] = {}
        for group, tensors in ahead(self._read, list(self._groups())):
            if not group.experts:
                current = LayerPass(self.setup, group.layer, stores)
                begun, settled = time.monotonic(), {}
                new = current.attend(tensors)
            else:
                new = current.run_experts(group.experts, tensors)
            if group.layer in self.to_solve:
                settled |= new
                yield from ((spec, new[spec.name] if spec.name in new else tensors[spec.name]) for spec in group.specs)
            if group.last:
                current.close()
                if group.layer in self.to_solve and self.on_layer is not None:
                    self.on_layer(self._report(current, settled, time.monotonic() - begun))

    def _groups(self) -> Iterator[_Group]:
        config, at_once = self.setup.config, self.setup.plan.experts_at_once
        specs = [spec for spec in self.source.inventory if spec.layer is not None]
        for layer in range(max(self.to_solve, default=-1) + 1):
            own = [spec for spec in specs if spec.layer == layer]
            yield _Group(layer, range(0), tuple(spec for spec in own if spec.expert is None), False)
            for part in spans(config.num_experts, at_once):
                experts = range(part.start, part.stop)
                chosen = tuple(spec for spec in own if spec.expert in experts)
                yield _Group(layer, experts, chosen, part.stop == config.num_experts)

    def _read(self, group: _Group) -> Tensors:
        finished = group.layer not in self.to_solve
        return {
            spec.name: self._read_finished(spec)
            if finished and spec.role in quantized_roles()
            else self._read_source(spec)
            for spec in group.specs
        }

    def _embed(self, ids_N: Tensor, stores: Stores) -> None:
        """Into `stores.hidden` what goes into the first layer."""
        if not self.to_solve:
            return
        table = self._read_source(self.source.specs[EMBEDDING])
        for rows in spans(len(ids_N), self.setup.plan.chunk_sequences * self.setup.seq_len):
            values = F.embedding(ids_N[rows], table) if isinstance(table, Tensor) else decode_rows(table, ids_N[rows])
            stores.hidden[rows] = values.to(stores.hidden)

    def _report(self, current: LayerPass, settled: dict[str, Settled], elapsed_s: float) -> LayerReport:
        records = [one.record for one in settled.values() if one.record is not None]
        errors = [record["output_error"] for record in records if "output_error" in record]
        return LayerReport(
            current.index,
            self.setup.config.num_hidden_layers,
            sum(errors) / max(len(errors), 1),
            current.expert_tokens,
            sum("fallback" in record for record in records),
            elapsed_s,
        )
