"""What a loaded model takes: predicted, and measured beside it."""

from typing import TYPE_CHECKING, Any

import torch

from minibble.runtime.devices import gpu_bytes
from minibble.runtime.layers import Embedding, Linear
from minibble.runtime.moe import MoE
from minibble.runtime.plan import MemoryPlan, plan_memory
from minibble.runtime.planning.placement import Placement

if TYPE_CHECKING:
    from minibble.runtime.model import MiniMaxForCausalLM


def plan(model: "MiniMaxForCausalLM", context: int, batch: int) -> MemoryPlan | Placement:
    """For `batch` sequences of `context` tokens, the weights where they are."""
    assert model.checkpoint is not None, "the model was not loaded from a checkpoint"
    if model.placement is not None:
        return model.placement.resized(model.checkpoint, context, batch)
    return plan_memory(
        model.checkpoint, model.device, model.dtype, context=context, batch=batch, prefill_chunk=model.prefill_chunk,
        budget_bytes=model.budget_bytes,
    )  # fmt: skip


def report(model: "MiniMaxForCausalLM", context: int, batch: int) -> dict[str, Any]:
    """The plan beside what is measured: bytes of the weights held and, of each GPU, what is in use and was at most.

    Of a GPU, `driver_bytes` are what its driver counts for all processes, `reserved_bytes` and `allocated_bytes` the
    most that torch's allocator took and gave out; `peak_gpu_bytes` are the latter alone.
    """
    modules = [module for module in model.modules() if isinstance(module, Linear | Embedding | MoE)]
    packed = sum(module.packed.nbytes for module in modules if module.packed is not None)
    packed += sum(store.device_nbytes for store in model.stores)
    moved = model.embedding.host_nbytes
    measured: dict[str, Any] = {"weights_bytes": packed + sum(weight.nbytes for weight in model.parameters()) - moved}
    gpus = [device for device in model.devices if device.type == "cuda"]
    if gpus:
        measured["peak_gpu_bytes"] = [torch.cuda.max_memory_allocated(device) for device in gpus]
        measured["gpus"] = [gpu_bytes(device) for device in gpus]
    if model.stores or moved:
        measured["host_bytes"] = sum(store.host_nbytes for store in model.stores) + moved
        errands = [store.errands for store in model.stores if store.errands is not None]
        measured["cpu_experts_bytes"] = sum(one.processor.nbytes for one in errands)
        measured["disk_bytes"] = sum(store.disk_nbytes for store in model.stores)
        measured["experts"] = [store.stats.to_json() for store in model.stores]
    return {"predicted": plan(model, context, batch).to_json(), "measured": measured}
