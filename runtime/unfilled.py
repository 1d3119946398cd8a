"""A model without weights that knows where each of them goes, until all have come."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minibble.quantize.errors import CheckpointError
from minibble.quantize.inventory import TensorSpec
from minibble.quantize.nf4_math import zero_byte
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.devices import cap
from minibble.runtime.experts.processor import Processor
from minibble.runtime.experts.store import ExpertStore
from minibble.runtime.experts.table import OffloadedTable
from minibble.runtime.experts.tiering import Tiering
from minibble.runtime.kernels.linear4 import prepare
from minibble.runtime.kernels.linear4.skinny import MAX_EXPERTS
from minibble.runtime.kernels.moe4.table import MOST, ExpertTable, RecordTable, largest, record_layouts
from minibble.runtime.layers import Embedding, Linear
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.plan import Source, default_prefill_chunk, held_dtype
from minibble.runtime.planning.placement import DevicePlan, Placement


def packs(source: Source, devices: Sequence[torch.device], dtype: torch.dtype) -> bool:
    """True if the experts of `source` become records on `devices`, which a placement is made of."""
    config, format = source.config, source.format
    if format is None or any(s.role == "expert" and s.name not in source.quantized for s in source.inventory):
        return False
    sizes = (config.hidden_size, config.intermediate_size)
    return config.num_experts <= MAX_EXPERTS and all(
        record_layouts(*sizes, format, dtype, device) is not None for device in devices
    )


class Unfilled:
    """Made `on` given devices or `placed` by a plan; `fill` it with every module, and take what is then `filled`."""

    def __init__(self, source: Source, dtype: torch.dtype, devices: Sequence[torch.device]):
        self.source, self.devices = source, list(devices)
        self.model = MiniMaxForCausalLM(source.config, dtype)
        self.model.prefill_chunk = default_prefill_chunk(self.devices[0])
        self.tables: dict[int, RecordTable] = {}

    @classmethod
    def on(
        cls, source: Source, devices: torch.device | Sequence[torch.device], dtype: torch.dtype = torch.bfloat16
    ) -> "Unfilled":
        """Everything on one device, or each layer on its own of `devices`; experts as records where kernels for them
        run, and all of a layer are 4-bit."""
        if isinstance(devices, torch.device):
            devices = [devices] * source.config.num_hidden_layers
        made = cls(source, dtype, devices)
        for device in set(made.devices):
            cap(device, None)
        wide = {s.layer for s in source.inventory if s.role == "expert" and s.name not in source.quantized}
        for layer in range(source.config.num_hidden_layers):
            if source.format is not None and layer not in wide:
                made._hold_all(layer)
        return made

    @classmethod
    def placed(
        cls,
        source: Source,
        placement: Placement,
        folder: Path | None = None,
        capped: bool = False,
    ) -> "Unfilled":
        """Layers and experts where `placement` says; `folder` is for experts that wait on disk.

        With `capped` torch cannot take more than the plan's budgets on its GPUs, whatever happens.
        """
        devices = [torch.device(plan.device) for plan in placement.devices for _ in plan.layers]
        made = cls(source, getattr(torch, placement.dtype), devices)
        made.model.placement, made.model.prefill_chunk = placement, placement.prefill_chunk
        if placement.embedding_bytes:
            made.model.embedding.on = devices[0]
        try:
            for plan in placement.devices:
                cap(torch.device(plan.device), plan.budget_bytes - plan.overhead_bytes if capped else None)
                if plan.slots:
                    made._hold_some(plan, placement, folder)
                else:
                    for layer in plan.layers:
                        made._hold_all(layer)
        except BaseException:
            made.close()
            raise
        return made

    def _hold_all(self, layer: int) -> None:
        config, format = self.source.config, self.source.format
        assert format is not None
        sizes = (config.num_experts, config.hidden_size, config.intermediate_size)
        table = ExpertTable.empty(*sizes, format, self.model.dtype, self.devices[layer])
        if table is not None:
            self._hold(layer, table)

    def _hold_some(self, plan: DevicePlan, placement: Placement, folder: Path | None) -> None:
        config, format, device = self.source.config, self.source.format, torch.device(plan.device)
        assert format is not None
        layouts = record_layouts(config.hidden_size, config.intermediate_size, format, self.model.dtype, device)
        assert layouts is not None, "a placement for experts that are no records"
        tiers = Tiering(
            resident=dict(zip(plan.layers, plan.resident, strict=True)),
            pinned={layer: placement.pinned[layer] for layer in plan.layers},
            disk={layer: placement.disk[layer] for layer in plan.layers},
            spare=plan.slots,
        )
        own, division = [key for key in placement.computed if key[0] in plan.layers], placement.division
        processor = None if division is None or not own else Processor(own, division.units)
        store = ExpertStore(
            device, plan.record_bytes, tiers, folder, processor=processor, units=config.intermediate_size
        )
        self.model.stores.append(store)
        before: OffloadedTable | None = None
        for layer in plan.layers:
            table = OffloadedTable(store, layer, *layouts)
            if before is not None:
                before.following = table
            self._hold(layer, table)
            before = table

    def _hold(self, layer: int, table: RecordTable) -> None:
        self.model.layers[layer].moe.set_packed(table)
        self.tables[layer] = table

    def device_of(self, spec: TensorSpec) -> torch.device:
        """Where a tensor goes: what comes before and after the layers beside the first and the last of them."""
        if spec.layer is not None:
            return self.devices[spec.layer]
        if spec.role == "embedding":
            return self.devices[0] if self.model.embedding.on is None else torch.device("cpu")
        return self.devices[-1]

    def fill(self, name: str, specs: list[TensorSpec], parts: list[Tensor | QuantizedTensor]) -> None:
        """Give the module `name` its weight: the rows of `parts`, in 4 bits or as a tensor; or its record, if it is
        an expert's of a layer with a table."""
        packed = [part for part in parts if isinstance(part, QuantizedTensor)]
        table = None if specs[0].layer is None else self.tables.get(specs[0].layer)
        if specs[0].expert is not None and table is not None:
            packed = [part.to(self.device_of(specs[0])) for part in packed]
            for spec, part in zip(specs, packed, strict=True):
                if (found := largest(part)) > MOST:
                    raise CheckpointError(
                        f"{spec.name}: weights of up to {found:,.0f}, kernels of experts take up to {MOST:,.0f}; look "
                        "at where the checkpoint comes from, or set MINIBBLE_KERNELS=reference"
                    )
            table.put(specs[0].expert, "down" if len(parts) == 1 else "gate_up", packed)
            return
        module, device = self.model.get_submodule(name), self.device_of(specs[0])
        if module is self.model.head:
            self.model.unused_ids = _zero_rows(parts[0])
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if packed and tensors:
            kinds = ", ".join(f"{s.name} {'4-bit' if isinstance(p, QuantizedTensor) else '16-bit'}"
                              for s, p in zip(specs, parts, strict=True))  # fmt: skip
            raise CheckpointError(f"{kinds}: matrices that run as one must be stored alike")
        if tensors:
            dtype = held_dtype(specs[0], device, self.model.dtype)
            weight = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            module.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        elif isinstance(module, Embedding):
            module.set_packed(packed[0].to(device))
        else:
            assert isinstance(module, Linear), f"{name} cannot hold a 4-bit matrix"
            module.set_packed(prepare(packed, device, self.model.dtype))

    def filled(self) -> MiniMaxForCausalLM:
        """The model, all of whose weights have come."""
        missing = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        assert not missing, f"weights without a tensor: {missing[:3]}"
        for store in self.model.stores:
            store.seal()
        if any(device.type == "cuda" for device in self.devices):
            torch.cuda.empty_cache()  # what laying out took is now free for others
        return self.model.eval().requires_grad_(False)  # type: ignore[return-value]

    def close(self) -> None:
        """Give back what the model holds beside tensors, and the bound on them: there will be none."""
        self.model.close()


def _zero_rows(head: Tensor | QuantizedTensor) -> Tensor:
    """Ids whose row of the head [V, D] is all zero: vocabulary padding that was never trained."""
    if isinstance(head, QuantizedTensor):
        zero = (head.codes.view(head.shape[0], -1) == zero_byte(head.levels)).all(dim=1)
    else:
        zero = ~head.any(dim=1)
    return zero.nonzero().flatten()
