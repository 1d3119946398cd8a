"""Which layers and experts live on which GPU, in host memory or on disk, decided before anything is allocated.

Pure arithmetic. A budget counts everything that a GPU's memory holds for the process, the CUDA context included.
`expected_hit_rate` is the share of the routed experts' work that resident experts do. What the slots still hold of
the step before is not counted: where a step misses more experts than there are slots, they hold nothing of use.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from minibble.quantize.errors import BudgetError
from minibble.quantize.sizes import decimal
from minibble.runtime.plan import Source
from minibble.runtime.planning.device_bytes import Demand
from minibble.runtime.planning.machine import Division
from minibble.runtime.planning.shortage import exactly
from minibble.runtime.planning.split import POISON_RECORDS

Ids = tuple[tuple[int, ...], ...]  # of experts, for each layer


@dataclass(frozen=True)
class DevicePlan:
    """What `device` holds: `layers`, of these the `resident` experts, and `slots` that receive the others in turn.

    The reserve is what torch's allocator keeps beside tensors, the overhead what CUDA takes itself.
    """

    device: str
    budget_bytes: int
    layers: range
    resident: Ids
    slots: int
    record_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    state_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    overhead_bytes: int

    @property
    def experts(self) -> int:
        """How many experts are resident."""
        return sum(map(len, self.resident))

    @property
    def experts_bytes(self) -> int:
        """Records of resident experts and of slots, and of the one that stands for all that are not there."""
        return (self.experts + self.slots + (POISON_RECORDS if self.slots else 0)) * self.record_bytes

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for; the weights are those beside experts."""
        names = ("weights", "experts", "kv_cache", "state", "workspace", "reserve", "overhead")
        return {f"{name}_bytes": getattr(self, f"{name}_bytes") for name in names}

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; experts are counted, not named."""
        return {
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            "experts": self.experts,
            "slots": self.slots,
            "layers": [self.layers.start, self.layers.stop],
            "resident_per_layer": [len(ids) for ids in self.resident],
            "parts": self.parts,
        }


@dataclass(frozen=True)
class Placement:
    """Where everything is. `pinned` and `disk` are ids of experts for each layer of the model, as `resident` is.

    `prefill_chunk` are the tokens of each sequence that the workspace allows through the layers at a time. Of
    `host_bytes` `embedding_bytes` are those of the embedding, 0 where it is on the first GPU. The experts `computed`,
    (layer, expert), are divided with the CPU when they miss, which takes host memory beside.
    """

    devices: tuple[DevicePlan, ...]
    pinned: Ids
    disk: Ids
    host_bytes: int
    disk_bytes: int
    record_bytes: int
    dtype: str
    context: int
    batch: int
    prefill_chunk: int
    expected_hit_rate: float
    expected_decode_tokens_per_s: float
    embedding_bytes: int = 0
    computed: tuple[tuple[int, int], ...] = ()
    division: Division | None = None
    other_sequences: bool = False  # than the rate is for

    @property
    def total_bytes(self) -> int:
        """On all GPUs."""
        return sum(device.total_bytes for device in self.devices)

    def resized(self, source: Source, context: int, batch: int) -> "Placement":
        """The same weights in the same places, for other sequences; not checked, and in JSON without a rate."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        pinned = self.host_bytes - self.embedding_bytes
        demand = Demand.of(source, dtype, context, batch, self.prefill_chunk, pinned, self.embedding_bytes)
        parts: list[dict[str, Any]] = [{**demand.parts(d.layers.start, d.layers.stop)} for d in self.devices]
        devices = tuple(replace(d, **changed) for d, changed in zip(self.devices, parts, strict=True))
        return replace(self, devices=devices, context=context, batch=batch, other_sequences=True)

    def check(self) -> None:
        """Raise BudgetError if a GPU's total is over its budget."""
        for device in self.devices:
            short = device.total_bytes - device.budget_bytes
            if short > 0:
                raise BudgetError(
                    f"{device.device} needs {decimal(device.total_bytes)} for {self.batch} × {self.context} tokens: "
                    f"{exactly(short)} more than the {decimal(device.budget_bytes)} allowed; allow more, or load the "
                    "model for so large a context from the start"
                )

    @property
    def resident(self) -> Ids:
        """Ids of the experts on GPUs for each layer of the model."""
        return tuple(ids for device in self.devices for ids in device.resident)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the keys that other programs may rely on."""
        return {
            "devices": [device.to_json() for device in self.devices],
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "embedding": "host" if self.embedding_bytes else "gpu",
            "cpu_experts": len(self.computed),
            "cpu_units": 0 if self.division is None else self.division.units,
            "experts": {name: sum(map(len, getattr(self, name))) for name in ("resident", "pinned", "disk")},
            "record_bytes": self.record_bytes,
            "dtype": self.dtype,
            "context": self.context,
            "batch": self.batch,
            "prefill_chunk": self.prefill_chunk,
            "expected_hit_rate": self.expected_hit_rate,
            **({} if self.other_sequences else {"expected_decode_tokens_per_s": self.expected_decode_tokens_per_s}),
        }
