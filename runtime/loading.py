"""From a checkpoint to a model that runs: every tensor of the inventory, each exactly once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.builtin import resolve_source
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.inventory import TensorSpec
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.devices import best_dtype, the_devices
from minibble.runtime.experts import division
from minibble.runtime.layout import by_module
from minibble.runtime.measured import measured_machine
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.plan import default_prefill_chunk, plan_memory
from minibble.runtime.planning.planner import plan_placement
from minibble.runtime.quality import read_quality
from minibble.runtime.unfilled import Unfilled, packs

DEFAULT_CONTEXT = 4096  # tokens planned for where the caller does not say
READERS = 4  # threads that read ahead: one alone does not keep a disk busy, and copies out of the page cache
READ_AHEAD = 8  # matrices: 16-bit embedding and head of 2.5 GB each, others of at most a few hundred MB

Progress = Callable[[int, int, str], None]  # bytes read, all bytes, what comes next


def load(
    path: str | Path,
    gpu_memory: int | None = None,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    dtype: torch.dtype | None = None,
    *,
    context: int = DEFAULT_CONTEXT,
    batch: int = 1,
    host_memory: int | None = None,
    offload_folder: str | Path | None = None,
    prefill_chunk: int | None = None,
    cpu_experts: bool = False,
    progress: Progress | None = None,
) -> MiniMaxForCausalLM:
    """The model of the checkpoint `path` (a folder, 16-bit or 4-bit, or `demo`), ready to generate.

    `device` is one or several, also as "cuda:0,cuda:1", by default the first GPU, else the CPU; layers are divided
    among several GPUs. `dtype` of activations is by default bfloat16 where the device computes in it, else float32.
    `gpu_memory` in bytes bounds what `batch` sequences of `context` tokens may take on all GPUs together, by default
    what is free there. Experts that do not fit wait in host memory, up to `host_memory` bytes pinned, and then, if
    there is an `offload_folder`, in a file in it: kernels' layout for 4-bit checkpoints only. Prompts go through the
    layers by `prefill_chunk` tokens at a time, by default as many as suits device and memory. With `cpu_experts` the
    CPU computes a part of each missing expert of a decode step while the GPU reads the rest, which rounds otherwise,
    and holds such parts twice as far as host memory goes. `progress` is called with bytes read, all bytes, and what is
    read next. BudgetError says what is missing where even that does not fit; CheckpointError names what is missing,
    left over or not 4-bit.
    """
    checkpoint = Checkpoint.open(resolve_source(path))
    tokenizer = load_tokenizer(checkpoint.path)  # a bad one is found before weights are read
    devices = the_devices(device)
    dtype = dtype or best_dtype(devices[0])
    folder = None if offload_folder is None else Path(offload_folder)
    if packs(checkpoint, devices, dtype):
        machine = measured_machine(checkpoint, devices, dtype, host_memory, folder, cpu_experts)
        placement = plan_placement(
            checkpoint, machine, dtype=dtype, context=context, batch=batch, gpu_memory=gpu_memory,
            counts=_expert_counts(checkpoint), prefill_chunk=prefill_chunk,
        )  # fmt: skip
        division.warn_unless_planned(machine, placement)
        model = Unfilled.placed(checkpoint, placement, folder, capped=gpu_memory is not None)
    else:
        _refuse({"several devices": len(devices) > 1, "host memory": host_memory, "an offload folder": folder,
                 "experts on the CPU": cpu_experts})  # fmt: skip
        chunk = prefill_chunk or default_prefill_chunk(devices[0])
        plan_memory(
            checkpoint, devices[0], dtype, context=context, batch=batch, prefill_chunk=chunk, budget_bytes=gpu_memory
        ).check()
        model = Unfilled.on(checkpoint, devices[0], dtype)
        model.model.budget_bytes, model.model.prefill_chunk = gpu_memory, chunk
    model.model.checkpoint, model.model.tokenizer = checkpoint, tokenizer
    try:
        _generation_config(model.model, checkpoint.path)
        return _filled(model, checkpoint, progress)
    except BaseException:
        model.close()
        raise


def _refuse(placing: dict[str, Any]) -> None:
    """ConfigError if something is asked for that only a placement can do."""
    unused = ", ".join(name for name, given in placing.items() if given)
    if unused:
        raise ConfigError(f"{unused}: only 4-bit checkpoints on GPUs in bfloat16 can be divided; leave that out")


def _filled(model: Unfilled, checkpoint: Checkpoint, progress: Progress | None) -> MiniMaxForCausalLM:
    total, done = sum(map(checkpoint.stored_nbytes, checkpoint.inventory)), 0
    for module, specs, parts in _read_ahead(checkpoint):
        if progress is not None:
            progress(done, total, specs[0].name)
        model.fill(module, specs, parts)
        done += sum(map(checkpoint.stored_nbytes, specs))
    return model.filled()


def _read_ahead(
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, list[TensorSpec], list[Tensor | QuantizedTensor]]]:
    """Each module of the model, its tensors' specs and the tensors, which threads read while others are used."""

    def read(specs: list[TensorSpec]) -> list[Tensor | QuantizedTensor]:
        return [checkpoint.read(spec) for spec in specs]

    coming: deque[tuple[str, list[TensorSpec], Future[list[Tensor | QuantizedTensor]]]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        try:
            for module, names in by_module(checkpoint.config):
                specs = [checkpoint.specs[name] for name in names]
                coming.append((module, specs, pool.submit(read, specs)))
                if len(coming) > READ_AHEAD:
                    module, specs, parts = coming.popleft()
                    yield module, specs, parts.result()
            while coming:
                module, specs, parts = coming.popleft()
                yield module, specs, parts.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _expert_counts(checkpoint: Checkpoint) -> Sequence[Sequence[int]] | None:
    """The tokens that each expert got in the calibration, if there was one."""
    quality = None if checkpoint.format is None else read_quality(checkpoint.path, checkpoint.config)
    return None if quality is None else quality.expert_tokens


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
