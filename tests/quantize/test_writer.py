"""The shard plan is exact, the files are those of safetensors, and an interrupted output can be continued."""

import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minibble.quantize import writer as writer_module
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.journal import SealedShard, append_journal, create_journal, differences, read_journal
from minibble.quantize.nf4 import NF4
from minibble.quantize.safetensors_file import read_header
from minibble.quantize.shards import plan_shards
from minibble.quantize.writer import CheckpointWriter, Produced

IDENTITY = {"version": "1", "source": {"fingerprint": "f"}, "settings": {"method": "nf4"}}

layouts = st.lists(
    st.tuples(
        st.text("ab.é\"", max_size=12),
        st.dictionaries(
            st.sampled_from(["", ".absmax", ".quant_map"]),
            st.tuples(
                st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.float16]),
                st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
            ),
            min_size=1,
        ),
    ),
    max_size=20,
)  # fmt: skip


def items(drawn):
    return [
        (f"{number}{name}", {f"{number}{name}{suffix}": value for suffix, value in tensors.items()})
        for number, (name, tensors) in enumerate(drawn)
    ]


def random_tensor(dtype, shape):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def produce(shard):
    for name in shard.names:
        tensors = {key: random_tensor(*value) for key, value in shard.tensors.items() if key.startswith(name)}
        yield Produced(name, tensors, {"relative_error": 0.5})


@pytest.fixture
def shards():
    specs = [(f"x{n}.weight", NF4().stored(f"x{n}.weight", (16, 64))) for n in range(6)]
    plan = plan_shards(specs, 6000)
    assert len(plan) == 3
    return plan


def write(out, shards, count=None, resume=False):
    """Write `count` of the pending shards; all of them and the rest of the checkpoint if None."""
    torch.manual_seed(0)
    content = {shard.filename: list(produce(shard)) for shard in shards}
    with CheckpointWriter(out, shards, IDENTITY, resume) as writer:
        pending = [] if writer.complete else writer.pending
        for shard in pending[:count]:
            writer.write_shard(shard, content[shard.filename])
        if count is None and not writer.complete:
            writer.finish({"a": 1}, {"manifest_version": 1, **IDENTITY}, [])
    return len(pending)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(layouts, st.integers(1, 20_000))
def test_plan_keeps_order_sums_and_bounds(drawn, shard_size):
    specs = items(drawn)
    shards = plan_shards(specs, shard_size)
    assert [name for shard in shards for name in shard.names] == [name for name, _ in specs]
    assert {key: value for shard in shards for key, value in shard.tensors.items()} == {
        key: value for _, tensors in specs for key, value in tensors.items()
    }
    for number, shard in enumerate(shards, start=1):
        assert shard.filename == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        assert shard.nbytes <= shard_size or len(shard.names) == 1


@given(layouts)
def test_the_header_is_that_of_safetensors(tmp_path_factory, drawn):
    """Byte for byte what `save_file` writes, and as long as planned."""
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    for shard in plan_shards(items(drawn), 1 << 20):
        save_file({key: random_tensor(*value) for key, value in shard.tensors.items()}, path, metadata={"format": "pt"})
        data = path.read_bytes()
        assert data.startswith(shard.header[0]) and len(data) == shard.nbytes
        assert {key: entry.start for key, entry in read_header(path).entries.items()} == shard.header[1]


def test_a_shard_size_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="shard size 0"):
        plan_shards([], 0)


def test_files_equal_save_file(tmp_path, shards):
    write(tmp_path / "out", shards)
    for path in (tmp_path / "out").glob("*.safetensors"):
        save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "again").read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * NF4().nbytes((16, 64))
    assert set(index["weight_map"].values()) == {shard.filename for shard in shards}


def test_extra_json_is_written_before_the_index(tmp_path, shards, monkeypatch):
    order = []
    write_atomic = writer_module.write_atomic
    monkeypatch.setattr(
        writer_module, "write_atomic", lambda path, data: (order.append(path.name), write_atomic(path, data))
    )
    with CheckpointWriter(tmp_path, shards, IDENTITY) as writer:
        for shard in writer.pending:
            writer.write_shard(shard, produce(shard))
        writer.finish({"a": 1}, {"manifest_version": 1}, [], {"quantize_config.json": {"bits": 4}})
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == {"bits": 4}
    assert order == ["quantize_config.json", "config.json", "minibble.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_resume_keeps_finished_shards_and_ends_identical(tmp_path, shards, count):
    write(tmp_path / "whole", shards)
    write(tmp_path / "out", shards, count)
    assert (tmp_path / "out" / ".minibble-journal.jsonl").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert write(tmp_path / "out", shards, resume=True) == 3 - count
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert write(tmp_path / "out", shards, resume=True) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_resume_does_not_trust_damaged_shards(tmp_path, shards):
    write(tmp_path / "whole", shards)
    write(tmp_path / "out", shards, 3)
    first, second, _ = sorted((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    assert write(tmp_path / "out", shards, resume=True) == 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_resume_with_other_settings_says_what_differs(tmp_path, shards):
    write(tmp_path / "out", shards, 1)
    other = IDENTITY | {"settings": {"method": "gptq"}}
    with pytest.raises(CheckpointError, match=r"settings\.method was 'nf4', now 'gptq'"):
        CheckpointWriter(tmp_path / "out", shards, other, resume=True).__enter__()
    write(tmp_path / "out", shards, resume=True)
    with pytest.raises(CheckpointError, match=r"settings\.method"):
        CheckpointWriter(tmp_path / "out", shards, other, resume=True).__enter__()


def test_an_output_that_is_not_empty(tmp_path, shards):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"not empty \(notes.txt\); choose an empty folder"):
            write(tmp_path, shards, resume=resume)
    write(tmp_path / "out", shards, 1)
    with pytest.raises(CheckpointError, match="--resume"):
        write(tmp_path / "out", shards)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_writers_do_not_share_a_folder(tmp_path, shards):
    second = CheckpointWriter(tmp_path / "out", shards, IDENTITY, resume=True)
    with CheckpointWriter(tmp_path / "out", shards, IDENTITY), pytest.raises(CheckpointError, match="another process"):
        second.__enter__()
    write(tmp_path / "out", shards, resume=True)


def test_too_little_disk_is_said_before_writing(tmp_path, shards, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"1\.0 kB are free .* are needed"):
        write(tmp_path / "out", shards)
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("fails_at", [1, 3, 7, 30])
def test_a_full_disk_keeps_what_is_finished(tmp_path, shards, monkeypatch, fails_at):
    write(tmp_path / "whole", shards)
    calls = 0

    def full(fd, data, position):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(fd, data, position)

    original = writer_module.write_at
    monkeypatch.setattr(writer_module, "write_at", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*--resume"):
        write(tmp_path / "out", shards)
    assert not list((tmp_path / "out").glob(".*.partial"))
    write(tmp_path / "out", shards, resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_full_disk_while_sealing(tmp_path, shards, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, CheckpointWriter(tmp_path / "out", shards, IDENTITY) as writer:
        patch.setattr("os.fsync", full)
        writer.write_shard(shards[0], produce(shards[0]))
        with pytest.raises(CheckpointError, match="No space left"):
            writer.wait()
    assert not list((tmp_path / "out").glob("*.safetensors")) and not list((tmp_path / "out").glob(".*.partial"))
    write(tmp_path / "out", shards, resume=True)


def test_ctrl_c_leaves_no_partial_file(tmp_path, shards):
    def interrupted():
        yield next(produce(shards[1]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", shards, IDENTITY) as writer:
        writer.write_shard(shards[0], produce(shards[0]))
        writer.write_shard(shards[1], interrupted())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".minibble-journal.jsonl", shards[0].filename
    }  # fmt: skip
    assert write(tmp_path / "out", shards, resume=True) == 2


def test_stopped_between_any_two_files_of_the_end(tmp_path, shards, monkeypatch):
    """Config, manifest and index are written one by one: a folder with an index is whole."""
    write(tmp_path / "whole", shards)

    class Killed(BaseException):
        pass

    original = writer_module.write_atomic
    left = 0

    def write_atomic(path, data):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        original(path, data)

    for count in range(3):
        out, left = tmp_path / str(count), count
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(writer_module, "write_atomic", write_atomic)
            write(out, shards)
        assert not (out / "model.safetensors.index.json").exists()
        assert write(out, shards, resume=True) == 0
        assert snapshot(out) == snapshot(tmp_path / "whole")


def test_killed_between_index_and_end(tmp_path, shards):
    write(tmp_path / "whole", shards)
    write(tmp_path / "out", shards, 3)
    journal = (tmp_path / "out" / ".minibble-journal.jsonl").read_bytes()
    write(tmp_path / "out", shards, resume=True)
    (tmp_path / "out" / ".minibble-journal.jsonl").write_bytes(journal)
    (tmp_path / "out" / ".config.json.partial").write_bytes(b"{")
    assert write(tmp_path / "out", shards, resume=True) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_torn_last_line_of_the_journal_is_ignored(tmp_path):
    path = tmp_path / "journal"
    shard = SealedShard("a", 1, "00", {})
    create_journal(path, IDENTITY)
    append_journal(path, shard)
    whole = path.read_bytes()
    for cut in (b"{", b'{"filename": "b"', b"\x00\x00"):
        path.write_bytes(whole + cut)
        assert read_journal(path) == (IDENTITY, {"a": shard})
        assert path.read_bytes() == whole
    path.write_bytes(b"something else\n")
    with pytest.raises(CheckpointError, match="no journal"):
        read_journal(path)


def test_differences_name_the_key():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c was 2, now 3"]
    assert differences({}, {"a": 1}) == ["a was None, now 1"]
