"""`kill -9` at any moment: the job continues where it was, and every file ends byte-identical."""

import multiprocessing
import random
import signal
import time

import pytest

from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError
from minibble.quantize.job import quantize_checkpoint

KILLS = 5


@pytest.fixture(scope="module")
def whole(make_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    make_source(folder / "source")
    quantize_checkpoint(folder / "source", folder / "whole", device="cpu", shard_size="8kB")
    return folder


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder):
    return len(list(folder.glob("*.safetensors")))


def test_killed_again_and_again(whole, tmp_path):
    """Each run is killed at a random moment after some more shards were finished; the next one goes on."""
    out = tmp_path / "q"
    assert shards(whole / "whole") > 30
    rng = random.Random(7)
    # The server imports torch once; each child is a process of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minibble.quantize.job"])
    job = {"device": "cpu", "shard_size": "8kB", "resume": True}
    killed = 0
    for kill in range(KILLS):
        child = context.Process(target=quantize_checkpoint, args=(whole / "source", out), kwargs=job, daemon=True)
        child.start()
        before = shards(out) if out.exists() else 0
        while child.is_alive() and shards(out) < before + kill:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break  # a fast machine was done before
        killed += 1
        assert child.exitcode == -signal.SIGKILL and before + kill <= shards(out)
        if not (out / "model.safetensors.index.json").exists():
            with pytest.raises(CheckpointError):
                Checkpoint.open(out)
    assert killed >= 2
    quantize_checkpoint(whole / "source", out, **job)
    assert snapshot(out) == snapshot(whole / "whole")
