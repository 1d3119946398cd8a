"""The routed experts: every path against a float64 loop. N tokens, D hidden, F expert hidden, A active."""

import pytest
import torch
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import cpu as cpu_path
from minibble.runtime.kernels.linear4 import cpu_int4, prepare
from minibble.runtime.kernels.moe4 import moe4
from minibble.runtime.layers import Linear

D, F, EXPERTS = 128, 64, 4


class Expert:
    """What `moe4` sees of an expert, made from 4-bit matrices."""

    def __init__(self, w1: QuantizedTensor, w2: QuantizedTensor, w3: QuantizedTensor, device: torch.device):
        self.gate_up, self.down = Linear(2 * F, D), Linear(D, F)
        self.gate_up.set_packed(prepare([w1, w3], device, torch.float32))
        self.down.set_packed(prepare([w2], device, torch.float32))


FORMATS: tuple[Format, ...] = (NF4(), Int4(64), Int4(32))


def weights(format: Format) -> list[tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((F, D), (D, F), (F, D))
    return [
        tuple(format.encode(torch.randn(*shape, generator=generator) * 0.2) for shape in shapes)  # type: ignore[misc]
        for _ in range(EXPERTS)
    ]


def expected(x: Tensor, ids: Tensor, shares: Tensor, format: Format) -> Tensor:
    matrices = [[format.decode(q).double() for q in expert] for expert in weights(format)]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for index, share in zip(ids[token].tolist(), shares[token].tolist(), strict=True):
            w1, w2, w3 = matrices[index]
            gate = w1 @ x[token].double()
            out[token] += share * (w2 @ (gate * torch.sigmoid(gate) * (w3 @ x[token].double())))
    return out


def routed(N: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    shares, ids = torch.rand(N, EXPERTS, generator=generator).softmax(-1).topk(2)
    return torch.randn(N, D, generator=generator), ids, shares / shares.sum(-1, keepdim=True)


def error(device: torch.device, N: int, format: Format) -> float:
    x, ids, shares = routed(N)
    experts = [Expert(*matrices, device) for matrices in weights(format)]
    with torch.no_grad():
        y = moe4(x.to(device), ids.to(device), shares.to(device), experts).cpu().double()
    right = expected(x, ids, shares, format)
    return float((y - right).norm() / right.norm())


@pytest.mark.parametrize("N", [1, 2, 17, 63])
@pytest.mark.parametrize("path", ["gemv", "decode", "torch", "reference"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_cpu(monkeypatch: pytest.MonkeyPatch, path: str, N: int, format: Format) -> None:
    if path == "gemv" and not cpu_path.available():
        pytest.skip("numba is not installed")
    if path == "reference":
        monkeypatch.setenv("MINIBBLE_KERNELS", "reference")
    elif path != "gemv":
        monkeypatch.setattr(cpu_path, "available", lambda: False)
        monkeypatch.setattr(cpu_int4, "available", lambda: False)
    if path == "torch":
        monkeypatch.setattr(cpu_path, "bitsandbytes", lambda: None)
    assert error(torch.device("cpu"), N, format) < 1e-5


def test_a_large_negative_gate_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids, shares = routed(1)
    experts = [Expert(*matrices, torch.device("cpu")) for matrices in weights(NF4())]
    with torch.no_grad():
        assert moe4(1e4 * x, ids, shares, experts).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 2, 17, 63])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_cuda(cuda_device: torch.device, N: int, format: Format) -> None:
    assert error(cuda_device, N, format) < 1e-5
