"""Tiny checkpoints placed by a plan without a GPU: the kernels are read back byte by byte at their addresses."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import tiny
from golden.tiles_by_byte import read_back
from torch import Tensor
from torch.nn import functional as F

from minibble.quantize.formats import Format
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime import graphs, measured, unfilled
from minibble.runtime import model as model_module
from minibble.runtime.kernels.moe4 import table
from minibble.runtime.kernels.moe4.table import RecordTable
from minibble.runtime.kernels.tiles import TileLayout
from minibble.runtime.loading import load
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.planning.machine import Gpu, Machine

IDS = torch.tensor(tiny.prompts((30, 30), seed=11))
PROMPT = 24
CHUNK = 64  # tokens at a time: memory for smaller pieces would hold all of these small experts
_read: dict[bytes, Tensor] = {}


def matrix(record: bytes, layout: TileLayout) -> Tensor:
    key = record[: layout.nbytes]
    if key not in _read:
        _read[key] = read_back(key, layout)[: layout.N, : layout.K]
    return _read[key]


def by_address(
    self: RecordTable,
    addresses_E: Tensor,
    x_MD: Tensor,
    ids_MA: Tensor,
    weights_MA: Tensor,
    units_MA: Tensor | None = None,
) -> Tensor:
    """What the kernels compute, float32 [1, M, D], from the records to which the addresses on the device point."""
    out = torch.zeros(x_MD.shape)
    for token, (ids, weights) in enumerate(zip(ids_MA.tolist(), weights_MA.tolist(), strict=True)):
        for slot, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
            record = ctypes.string_at(int(addresses_E[expert]), self.gate_up.nbytes + self.down.nbytes)
            both = (matrix(record, self.gate_up) @ x_MD[token].float()).view(-1, 2, 16)
            hidden = (F.silu(both[:, 0]) * both[:, 1]).flatten()
            if units_MA is not None:
                hidden[int(units_MA[token, slot]) :] = 0
            out[token] += weight * (matrix(record[self.gate_up.nbytes :], self.down) @ hidden)
    return out[None]


def layouts(D: int, inner: int, format: Format, *others: Any) -> tuple[TileLayout, TileLayout]:
    gate_up, down = TileLayout.of_format((inner, inner), D, format, True), TileLayout.of_format((D,), inner, format)
    assert gate_up is not None and down is not None
    return gate_up, down


def replace_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The CPU in place of a GPU, with as much memory as is said here, and the kernels in torch."""
    there: dict[str, Any] = {"host_bytes": None, "disk_bytes": None}
    gpu = Gpu("cpu", 10**10)
    monkeypatch.setattr(
        measured,
        "this_machine",
        lambda devices, host, folder: Machine((gpu,), there["host_bytes"], there["disk_bytes"]),
    )
    for module in (table, unfilled):
        monkeypatch.setattr(module, "record_layouts", layouts)
    there["caps"] = []
    for module in (unfilled, model_module):
        monkeypatch.setattr(module, "cap", lambda device, nbytes: there["caps"].append((str(device), nbytes)))
    monkeypatch.setattr(graphs, "unfused", lambda model: None)
    monkeypatch.setattr(RecordTable, "read", by_address)
    monkeypatch.setattr(RecordTable, "__call__", lambda self, *given: by_address(self, self.addresses, *given))
    return there


def counted(ids: Tensor, far: Tensor) -> Tensor:
    """Different experts near and far."""
    chosen = far[ids.flatten().unique().long()]
    return torch.tensor([int((chosen == 0).sum()), int(chosen.sum())])


def quantized(
    folder: Path, make_source: Any, quantize: Callable[[Path, Path], Any] = quantize_checkpoint, **changes: Any
) -> Path:
    """A model of three layers in 4 bits, by default NF4, without a tokenizer."""
    config = tiny.original_json(num_hidden_layers=3, attn_type_list=[0, 0, 1], **changes)
    out = folder / "q"
    quantize(make_source(folder / "m", config=config), out)
    for path in out.glob("tokenizer*"):
        path.unlink()
    return out


def placed(folder: Path, missing: int = 0, **options: Any) -> MiniMaxForCausalLM:
    """The model, with memory for all experts but so many."""
    whole = load(folder, device="cpu", dtype=torch.bfloat16, prefill_chunk=CHUNK)
    assert whole.placement is not None and not whole.stores
    if not missing:
        return whole
    budget = whole.placement.total_bytes - missing * whole.placement.record_bytes
    return load(folder, budget, "cpu", torch.bfloat16, prefill_chunk=CHUNK, **options)
