"""From a checkpoint to a model that runs: every tensor of the inventory, each exactly once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minibble.quantize.builtin import resolve_source
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.inventory import TensorSpec
from minibble.quantize.nf4_math import zero_byte
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import prepare
from minibble.runtime.layers import Embedding, Linear
from minibble.runtime.layout import by_module
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.moe import MoE
from minibble.runtime.plan import Source, default_prefill_chunk, held_dtype, plan_memory

if TYPE_CHECKING:
    from minibble.runtime.kernels.moe4.table import ExpertTable

DEFAULT_CONTEXT = 4096  # tokens planned for where the caller does not say


def load(
    path: str | Path,
    gpu_memory: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    context: int = DEFAULT_CONTEXT,
    batch: int = 1,
) -> MiniMaxForCausalLM:
    """The model of the checkpoint `path` (a folder, 16-bit or 4-bit, or `demo`), ready to generate.

    `device` defaults to the first GPU, else the CPU; `dtype` of activations to bfloat16 where the device computes
    in it, else float32. `gpu_memory` in bytes bounds what `batch` sequences of `context` tokens may take:
    BudgetError if they need more. CheckpointError names what is missing, left over or not 4-bit.
    """
    checkpoint = Checkpoint.open(resolve_source(path))
    device = _device(device)
    dtype = dtype or best_dtype(device)
    plan_memory(checkpoint, device, dtype, context=context, batch=batch, budget_bytes=gpu_memory).check()
    model = MiniMaxForCausalLM(checkpoint.config, dtype)
    model.prefill_chunk = default_prefill_chunk(device)
    devices = [device] * checkpoint.config.num_hidden_layers
    tables = expert_tables(model, checkpoint, devices)
    for module, names in by_module(checkpoint.config):
        specs = [checkpoint.specs[name] for name in names]
        fill(model, module, specs, [checkpoint.read(spec) for spec in specs], device_of(specs[0], devices), tables)
    _check_complete(model)
    model.eval().requires_grad_(False)
    model.checkpoint = checkpoint
    model.tokenizer = load_tokenizer(checkpoint.path)
    _generation_config(model, checkpoint.path)
    return model


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there is hardware for its products, float32 elsewhere, which is then the faster one."""
    if device.type == "cuda":
        return torch.bfloat16
    from minibble.runtime.kernels.linear4 import cpu

    return torch.bfloat16 if cpu.has_fused() else torch.float32


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device '{device}' is unknown: use cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{device}' is not supported: use cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}' is not there: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def device_of(spec: TensorSpec, devices: Sequence[torch.device]) -> torch.device:
    """Where a tensor goes if the layers go to `devices`: what comes before and after them beside its neighbour."""
    if spec.layer is not None:
        return devices[spec.layer]
    return devices[0] if spec.role == "embedding" else devices[-1]


def expert_tables(
    model: MiniMaxForCausalLM, source: Source, devices: Sequence[torch.device]
) -> "dict[MoE, ExpertTable]":
    """Room for the experts of the layers whose experts are all 4-bit, where kernels for their records run; the layers
    hold them from now on. `devices` are the layers'."""
    config, format = source.config, source.format
    if format is None or all(device.type != "cuda" for device in devices):
        return {}
    from minibble.runtime.kernels.moe4.table import ExpertTable

    wide = {s.layer for s in source.inventory if s.role == "expert" and s.name not in source.quantized}
    shape = (config.num_experts, config.hidden_size, config.intermediate_size)
    tables = {}
    for index, (layer, device) in enumerate(zip(model.layers, devices, strict=True)):
        table = None if index in wide else ExpertTable.empty(*shape, format, model.dtype, device)
        if table is not None:
            layer.moe.set_packed(table)
            tables[layer.moe] = table
    return tables


def fill(
    model: MiniMaxForCausalLM,
    name: str,
    specs: list[TensorSpec],
    parts: list[Tensor | QuantizedTensor],
    device: torch.device,
    tables: "dict[MoE, ExpertTable]",
) -> None:
    """Give the module `name` its weight: the rows of `parts`, in 4 bits or as a tensor; or its record, if it is an
    expert's of a layer in `tables`."""
    packed = [part for part in parts if isinstance(part, QuantizedTensor)]
    if specs[0].expert is not None and (table := tables.get(_moe_of(model, specs[0]))) is not None:
        table.put(specs[0].expert, "down" if len(parts) == 1 else "gate_up", packed)
        return
    module = model.get_submodule(name)
    if module is model.head:
        model.unused_ids = _zero_rows(parts[0])
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if packed and tensors:
        kinds = ", ".join(f"{s.name} {'4-bit' if isinstance(p, QuantizedTensor) else '16-bit'}"
                          for s, p in zip(specs, parts, strict=True))  # fmt: skip
        raise CheckpointError(f"{kinds}: matrices that run as one must be stored alike")
    if tensors:
        dtype = held_dtype(specs[0], device, model.dtype)
        weight = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        module.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    elif isinstance(module, Embedding):
        module.set_packed(packed[0].to(device))
    else:
        assert isinstance(module, Linear), f"{name} cannot hold a 4-bit matrix"
        module.set_packed(prepare(packed, device, model.dtype))


def _moe_of(model: MiniMaxForCausalLM, spec: TensorSpec) -> MoE:
    moe = model.get_submodule(f"layers.{spec.layer}.moe")
    assert isinstance(moe, MoE)
    return moe


def _zero_rows(head: Tensor | QuantizedTensor) -> Tensor:
    """Ids whose row of the head [V, D] is all zero: vocabulary padding that was never trained."""
    if isinstance(head, QuantizedTensor):
        zero = (head.codes.view(head.shape[0], -1) == zero_byte(head.levels)).all(dim=1)
    else:
        zero = ~head.any(dim=1)
    return zero.nonzero().flatten()


def _check_complete(model: MiniMaxForCausalLM) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, f"weights without a tensor: {missing[:3]}"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of the checkpoint folder `path`; None where there is no tokenizer.json."""
    if not (path / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises whatever the file made it stumble over
        raise CheckpointError(f"{path / 'tokenizer.json'}: is no tokenizer ({error!r})") from error


def _generation_config(model: MiniMaxForCausalLM, path: Path) -> None:
    """Take over the checkpoint's generation_config.json, and the tokenizer's end and padding where there is none."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    config = model.generation_config
    if model.tokenizer is not None:
        if config.eos_token_id is None:
            config.eos_token_id = model.tokenizer.eos_token_id
        if config.pad_token_id is None:
            config.pad_token_id = model.tokenizer.pad_token_id
