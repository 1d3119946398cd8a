"""Products of many tokens from 4-bit tiles on a Hopper GPU: checked first, then timed beside cuBLAS.

    python benchmarks/tile_kernel.py [check] [linear] [decode] [experts]

Weights are rotated past the L2 cache; times are medians over replays of a CUDA graph. Prints JSON lines.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.kernels.linear4 import decoded, tile
from minibble.runtime.kernels.tiles import TileLayout, pack

FORMATS: dict[str, Format] = {
    "nf4-dq": NF4(), "nf4": NF4(double_quant=False), "g32": Int4(32), "g64": Int4(64), "g128": Int4(128)
}  # fmt: skip
DEVICE = torch.device("cuda", 0)
D, F, EXPERTS, ACTIVE = 6144, 9216, 32, 2


def matrix(format: str, *shapes: tuple[int, int], interleaved: bool = False) -> tuple[list, TileLayout, Tensor]:
    """Encoded parts of random weights, their layout and the packed bytes."""
    parts = [FORMATS[format].encode(torch.randn(*shape, device=DEVICE) * 0.02) for shape in shapes]
    layout = TileLayout.of(parts, interleaved)
    assert layout is not None
    return parts, layout, pack(parts, layout)


def activations(M: int, K: int) -> Tensor:
    return torch.randn(M, K, device=DEVICE).bfloat16()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def weights_of(parts: list[QuantizedTensor]) -> Tensor:
    return torch.cat([decode(q).double() for q in parts])


def check() -> None:
    """The worst relative error to a float64 product, by format and dtype of the output."""
    worst: dict[str, float] = {}
    for format in FORMATS:
        for shapes in (((F, D),), ((1008, 768), (77, 768)), ((320, F),)):
            parts, layout, data = matrix(format, *shapes)
            W = weights_of(parts)
            assert torch.equal(decoded.decode_tiles(data, layout), W.float().bfloat16())
            for M in (1, 2, 3, 7, 16, 17, 63, 64, 65, 300, 2048):
                x = activations(M, layout.K)
                expected = x.double() @ W.t()
                for dtype in (torch.bfloat16, torch.float32):
                    torch.full((1 << 23,), float("nan"), device=DEVICE)  # what the output is likely to be made of
                    key = f"{format} {str(dtype).removeprefix('torch.')}"
                    worst[key] = max(worst.get(key, 0), relative(tile.linear(x, data, layout, dtype), expected))
    print(json.dumps({"check": {key: float(f"{error:.2e}") for key, error in worst.items()}}), flush=True)
    assert max(worst.values()) < 3e-3


def median_us(calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
    """Median time of one of `calls`, made one after the other by a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return sorted(times)[rounds // 2]


def time_linear() -> None:
    """us of one 6144 -> 9216 product."""
    dense = [torch.randn(F, D, device=DEVICE).bfloat16() for _ in range(3)]
    held = {}
    for format in ("nf4-dq", "g128"):
        _, layout, data = matrix(format, (F, D))
        held[format] = layout, [data.clone() for _ in range(6)]
    for M in (16, 32, 64, 128, 256, 512, 1024, 2048, 8192):
        x, repeat = activations(M, D), max(1, min(6, 2048 // M))
        row = {"cublas": median_us([partial(torch.mm, x, w.t()) for w in dense] * 2 * repeat)}
        for format, (layout, datas) in held.items():
            row[format] = median_us([partial(tile.linear, x, data, layout) for data in datas] * repeat)
            if M >= 256:
                row[f"{format} decoded"] = median_us(
                    [partial(decoded.linear_decoded, x, data, layout) for data in datas]
                )
        print(json.dumps({"M": M, "us": {key: round(us, 1) for key, us in row.items()}}), flush=True)


def time_decode() -> None:
    for format in ("nf4-dq", "g128"):
        _, layout, data = matrix(format, (F, D))
        out = torch.empty(F, D, dtype=torch.bfloat16, device=DEVICE)
        us = median_us([partial(decoded.decode_tiles, data.clone(), layout, out=out) for _ in range(4)])
        print(json.dumps({"decode": format, "us": round(us, 1), "TB_s_written": round(out.nbytes / us / 1e6, 2)}))


def time_experts() -> None:
    """us and TFLOP/s of the routed experts of a layer of real size."""
    _, gate_up, first = matrix("nf4-dq", (F, D), (F, D), interleaved=True)
    _, down, second = matrix("nf4-dq", (D, F))
    records = torch.cat((first, second)).repeat(EXPERTS).view(EXPERTS, -1)
    table = records.data_ptr() + torch.arange(EXPERTS, device=DEVICE) * records.shape[1]
    for M in (64, 512, 2048, 8192):
        x = activations(M, D)
        ids = torch.rand(M, EXPERTS, device=DEVICE).topk(ACTIVE, dim=-1).indices
        weights = torch.rand(M, ACTIVE, device=DEVICE).softmax(-1)
        us = median_us([partial(tile.experts, x, ids, weights, table, gate_up, down, gate_up.nbytes)] * 2)
        rate = 6e-6 * M * ACTIVE * D * F / us
        print(json.dumps({"experts": M, "us": round(us, 1), "TFLOP_s": round(rate)}), flush=True)


def main() -> None:
    steps = {"check": check, "linear": time_linear, "decode": time_decode, "experts": time_experts}
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for step in sys.argv[1:] or steps:
        steps[step]()


if __name__ == "__main__":
    main()
