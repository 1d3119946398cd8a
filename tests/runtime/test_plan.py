"""What is planned for a GPU's kernels: arithmetic, so no GPU is needed."""

from pathlib import Path

import pytest
import torch

from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.formats import format_named
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime import plan
from minibble.runtime.bench.layers import random_model, real_config
from minibble.runtime.kernels.tiles import TileLayout
from minibble.runtime.layout import by_module
from minibble.runtime.plan import fused_workspace_nbytes, held_dtype, loading_nbytes, plan_memory

CUDA = torch.device("cuda", 0)


@pytest.fixture(params=["nf4", "int4"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_source, make_int4):  # type: ignore[no-untyped-def]
    folder: Path = tmp_path_factory.mktemp("plan")
    source = make_source(folder / "source")
    if request.param == "int4":
        return Checkpoint.open(make_int4(source, folder / "int4"))
    from minibble.quantize.job import quantize_checkpoint

    return Checkpoint.open(quantize_checkpoint(source, folder / "nf4", device="cpu").out)


@pytest.mark.parametrize("fused", [True, False])
def test_weights_are_those_of_the_layout(checkpoint: Checkpoint, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: every matrix as the kernels hold it, or, without them, as it is stored."""
    monkeypatch.setattr(plan, "usable", lambda dtype: fused)
    expected = 0
    for _, names in by_module(checkpoint.config):
        specs = [checkpoint.specs[name] for name in names]
        parts = [part for part in map(checkpoint.read, specs) if isinstance(part, QuantizedTensor)]
        if not parts:
            expected += sum(spec.numel * held_dtype(spec, CUDA, torch.bfloat16).itemsize for spec in specs)
            continue
        layout = TileLayout.of(parts, specs[0].expert is not None and len(parts) > 1)
        expected += layout.nbytes if fused and layout is not None else sum(part.nbytes for part in parts)
    assert plan_memory(checkpoint, CUDA, torch.bfloat16, context=64).weights_bytes == expected


def test_room_to_lay_out_the_largest_matrix(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short contexts need little to run, but every matrix passes through the GPU as it is stored."""
    monkeypatch.setattr(plan, "usable", lambda dtype: True)
    largest = max(
        sum(part.nbytes for part in map(checkpoint.read, map(checkpoint.specs.__getitem__, names))
            if isinstance(part, QuantizedTensor))
        for _, names in by_module(checkpoint.config)
    )  # fmt: skip
    assert loading_nbytes(checkpoint, CUDA, torch.bfloat16) == 2 * largest > 0
    assert loading_nbytes(checkpoint, torch.device("cpu"), torch.bfloat16) == 0
    monkeypatch.setattr(plan, "workspace_nbytes", lambda *arguments: 1)
    assert plan_memory(checkpoint, CUDA, torch.bfloat16, context=1).workspace_bytes == 2 * largest


def test_prompts_go_in_larger_pieces_on_gpus(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable", lambda dtype: True)
    asked: list[int] = []
    monkeypatch.setattr(plan, "workspace_nbytes", lambda source, device, dtype, tokens: asked.append(tokens) or 0)
    for device in (CUDA, torch.device("cpu")):
        plan_memory(checkpoint, device, torch.bfloat16, context=10_000, batch=2)
    plan_memory(checkpoint, CUDA, torch.bfloat16, context=100)
    assert asked == [2 * plan.PREFILL_CHUNK_CUDA, 2 * plan.PREFILL_CHUNK, 100]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [(0, 0, 0), (0, 1, 0)], ids=["lightning", "softmax between"])
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_a_prompt_takes_no_more_than_its_workspace(
    cuda_device: torch.device, pattern: tuple[int, ...], tokens: int
) -> None:
    """At the released model's sizes, several layers one after the other."""
    config = real_config(pattern, num_local_experts=4)
    format = format_named("nf4-dq")
    assert format is not None
    model = random_model(config, format, cuda_device)
    model.prefill_chunk = tokens
    ids = torch.randint(config.vocab_size, (1, tokens), device=cuda_device)
    for _ in range(2):  # the first makes what is kept
        torch.cuda.reset_peak_memory_stats(cuda_device)
        before = torch.cuda.memory_allocated(cuda_device)
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1)
    taken = torch.cuda.max_memory_allocated(cuda_device) - before
    work = fused_workspace_nbytes(config, torch.bfloat16, tokens) - fused_workspace_nbytes(config, torch.bfloat16, 0)
    assert 0.75 * work < taken <= 1.02 * work
