"""`kill -9` in the middle of a calibrated quantization: finished shards stay, and the output ends byte-identical."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minibble.calibrate.job import quantize
from minibble.quantize.builtin import demo_path
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError

KILLED_IN = (0, 1)  # layers, of which the first shard is then just finished
JOB: dict[str, Any] = {
    "method": "gptq", "group_size": 32, "samples": 2, "seq_len": 32, "sweeps": 1, "device": "cpu",
    "shard_size": "10kB",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(make_source: Callable[..., Path], tiny_config: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    """The folder of a tiny source with the built-in model's tokenizer, and of what an uninterrupted job makes of it."""
    folder = tmp_path_factory.mktemp("kill_calibrated")
    source = make_source(folder / "source", tiny_config(vocab_size=2048, num_hidden_layers=2, intermediate_size=64))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / file, source)
    (folder / "text.txt").write_text("Once upon a time there was a fox that jumped over a lazy dog. " * 20)
    quantize(source, folder / "whole", calibration=folder / "text.txt", **JOB)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def first_shard(folder: Path, layer: int) -> str:
    """The file that a layer's tensors begin in."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return min(file for name, file in weight_map.items() if name.startswith(f"model.layers.{layer}."))


def test_killed_in_the_middle(whole: Path, tmp_path: Path) -> None:
    """Each run goes on where the last one was killed, the second one with a layer that is finished."""
    out, rng = tmp_path / "q", random.Random(3)
    context = multiprocessing.get_context("forkserver")  # it imports torch once; each child is a process of its own
    context.set_forkserver_preload(["minibble.calibrate.job", "transformers.models.auto.tokenization_auto"])
    job = JOB | {"calibration": whole / "text.txt", "resume": True}
    killed = 0
    for layer in KILLED_IN:
        shard = first_shard(whole / "whole", layer)
        child = context.Process(target=quantize, args=(whole / "source", out), kwargs=job, daemon=True)
        child.start()
        while child.is_alive() and not (out / shard).exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break  # this process waited longer for its turn than the job took
        killed += 1
        assert child.exitcode == -signal.SIGKILL and (out / shard).exists()
        if not (out / "model.safetensors.index.json").exists():
            with pytest.raises(CheckpointError):
                Checkpoint.open(out)
    assert killed >= 1
    quantize(whole / "source", out, **job)
    assert snapshot(out) == snapshot(whole / "whole")
