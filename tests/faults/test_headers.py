"""Shards cut short, extended, or with a header made to mislead: each is an error that names the file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from minibble.quantize.errors import CheckpointError
from minibble.quantize.safetensors_file import MAX_HEADER_NBYTES, TensorEntry, TensorReader, read_header


def write(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start=0, stop=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def refused(path, *texts):
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    for text in (path.name, *texts):
        assert text in str(error.value)


def test_a_sound_file_is_read(tmp_path):
    header = read_header(write(tmp_path / "a.safetensors", {"x": entry(0, 8, (2,)), "y": entry(8, 16, (2, 1))}))
    assert header.entries["y"].shape == (2, 1) and header.entries["y"].nbytes == 8


def test_truncated_and_extended(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(path, "truncated")
    path.write_bytes(data + b"\0")
    refused(path, "longer than its header says")
    path.write_bytes(data[:20])
    refused(path, "header claims")
    path.write_bytes(data[:5])
    refused(path, "header claims")
    path.write_bytes(b"")
    refused(path)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"not json", "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b'{"x":1}', "malformed header entry"),
        (b"[" * 100_000, ""),
        (b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
         "appears twice"),
        ({"x": entry(dtype="F31")}, "unknown dtype"),
        ({"x": entry(shape=(5,))}, "needs 20"),
        ({"x": entry(shape=(-1, -4))}, "malformed shape"),
        ({"x": entry(shape=(True, 4))}, "malformed shape"),
        ({"x": entry(shape=(4.0,))}, "malformed shape"),
        ({"x": entry(shape=(2**62, 2**62))}, "needs"),
        ({"x": entry(shape=(2**64,))}, "malformed shape"),
        ({"x": entry(16, 0)}, "hold -16 bytes"),
        ({"x": entry(-8, 8)}, "malformed"),
        ({"x": entry(8, 24)}, "gap"),
        ({"x": entry(0, 16), "y": entry(8, 16, (2,))}, "overlaps"),
        ({"x": entry(0, 2**40, (2**38,))}, "truncated"),
    ],
)  # fmt: skip
def test_misleading_headers(tmp_path, header, text):
    refused(write(tmp_path / "a.safetensors", header), text)


def test_a_giant_header_length_is_not_believed(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (MAX_HEADER_NBYTES + 1, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        refused(path, str(length))
    with open(path, "wb") as file:
        file.write((MAX_HEADER_NBYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_NBYTES + 100)
    refused(path, "limit")


def test_a_file_cut_while_in_use_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    found = read_header(path).entries["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        TensorReader().read(path, found)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        TensorReader().read(tmp_path / "b", TensorEntry("F32", (1,), 0, 4))
