"""The experts of a layer on CUDA as far as no GPU is needed: the path of many tokens before Hopper, in torch."""

import pytest
import torch
from golden.tiles_by_byte import read_back
from torch import Tensor

from minibble.quantize.formats import format_named
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.runtime.kernels.moe4 import table as module
from minibble.runtime.kernels.moe4.table import ExpertTable
from minibble.runtime.kernels.tiles import TileLayout

D, F, EXPERTS = 256, 64, 4
CPU = torch.device("cpu")


def by_byte(x: Tensor, data: Tensor, layout: TileLayout, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As linear_decoded, from the bytes of the layout."""
    weight = read_back(bytes(data[: layout.nbytes].tolist()), layout)[: layout.N, : layout.K]
    return (x.float() @ weight.t()).to(dtype)


def test_many_tokens_before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert by expert; the last one has no token, and another gets all of them."""
    monkeypatch.setattr(module, "linear_decoded", by_byte)
    gate_up, down = TileLayout.make((F, F), D, "nf4", 64, False, True), TileLayout.make((D,), F, "nf4", 64, False)
    assert gate_up is not None and down is not None
    table, generator, held = ExpertTable(EXPERTS, gate_up, down, CPU), torch.Generator().manual_seed(0), []
    for expert in range(EXPERTS):
        both = [NF4(double_quant=False).encode(torch.randn(F, D, generator=generator) / 16) for _ in range(2)]
        last = NF4(double_quant=False).encode(torch.randn(D, F, generator=generator) / 8)
        table.put(expert, "gate_up", both)
        table.put(expert, "down", [last])
        held.append([decode(q).double().t() for q in (*both, last)])
    x = torch.randn(70, D, generator=generator).bfloat16()
    ids = torch.stack((torch.zeros(70).int(), 1 + torch.randint(0, 2, (70,), generator=generator).int()), dim=1)
    weights = torch.rand(70, 2, generator=generator)
    expected = torch.zeros(70, D, dtype=torch.float64)
    for expert, (gate, up, last64) in enumerate(held):
        share = (weights * (ids == expert)).sum(1).double()
        expected += share[:, None] * (torch.nn.functional.silu(x.double() @ gate) * (x.double() @ up) @ last64)
    y = table(x, ids, weights)
    assert y.shape == (1, 70, D)
    assert float((y[0].double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int4-g128"])
def test_no_room_without_the_kernels(name: str) -> None:
    format = format_named(name)
    assert format is not None
    assert ExpertTable.empty(EXPERTS, D, 128, format, torch.bfloat16, CPU) is None


def test_addresses_are_those_of_the_records() -> None:
    gate_up, down = (TileLayout.make(rows, 256, "int4", 128, False, len(rows) > 1) for rows in ((16, 16), (256,)))
    assert gate_up is not None and down is not None
    table = ExpertTable(EXPERTS, gate_up, down, CPU)
    assert table.addresses.tolist() == [record.data_ptr() for record in table.records]
    assert table.records.stride(0) % 256 == 0 and table.nbytes == EXPERTS * (gate_up.nbytes + down.nbytes)
