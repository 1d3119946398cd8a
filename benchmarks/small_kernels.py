"""The small kernels at the released size on a GPU: `python benchmarks/small_kernels.py`.

Lightning attention (a decode step, and prefill), the norm of a residual and the router, each from what it reads in
memory to what it leaves there, beside the time that its bytes take at the reading bandwidth measured in the same run.
Nothing is timed that is off from a float64 computation. Takes about 10 GB of GPU memory.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.runtime.attention import LIGHTNING_NORM_EPS, geometric_slopes
from minibble.runtime.bench import gpu
from minibble.runtime.bench.check import BOUND, checked
from minibble.runtime.kernels import lightning, norm, router
from minibble.runtime.kernels.lightning import blocked

RESULTS = Path(__file__).parent / "results"
D, H, K, E, A = 6144, 64, 128, 32, 2  # hidden, heads, head dim, experts, active
ALPHA, BETA, EPS = 160**0.25, 1.0, 1e-5
DECODE = (1, 2, 4, 16, 64)  # sequences
PREFILL = ((1, 512), (1, 2048), (1, 8192), (2, 8192), (4, 4096))  # sequences, tokens of each
NORM = ((1, 1), (1, 4), (1, 8), (16, 4), (64, 4), (512, 1), (8192, 1))  # rows, summands
ROUTER = (1, 2, 4, 16, 64, 512, 8192)  # tokens

# What a kernel gives: for lightning attention with what the product after it multiplies each token by.
Made = Tensor | tuple[Tensor, Tensor | None]
Case = tuple[list[Callable[[], Made]], Tensor, int]  # the same on different memory; expected of the first; bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    device = gpu.the_gpu(options.device)
    torch.manual_seed(0)
    with torch.inference_mode():
        result = measure(device)
    gpu.write_result(gpu.result_path(options.out, "small_kernels", result["hardware"]["gpu"]), result)
    for row in result["rows"]:
        print(f"{row['kernel']:14} {row['shape']:28} {row['us']:9.2f} us, floor {row['floor_us']:8.2f}")


def measure(device: torch.device) -> dict[str, Any]:
    """Every kernel at every size."""
    ceilings = gpu.ceilings(device)
    rows = []
    for kernel, shape, make in cases(device):
        calls, expected, nbytes = make()
        error = checked(f"{kernel}, {shape}", partial(whole, calls[0]), expected)
        us, floor_us = gpu.graph_us(calls), nbytes / ceilings["read_GB_per_s"] / 1e3
        figures = {"us": round(us, 2), "floor_us": round(floor_us, 2), "over_floor": round(us / floor_us, 2)}
        rows.append({"kernel": kernel, "shape": shape, "nbytes": nbytes, **figures, "error": error})
        del calls, expected
        torch.cuda.empty_cache()
    return {
        "what": "medians of graphs' replays, buffers in turn past the L2 cache; floors are bytes at read bandwidth",
        "hardware": gpu.hardware(device),
        "versions": gpu.versions(),
        "ceilings": ceilings,
        "bound": BOUND,
        "rows": rows,
    }


def cases(device: torch.device) -> list[tuple[str, str, Callable[[], Case]]]:
    """Name and sizes of each kernel, and what makes its calls."""
    return [
        *(("lightning", f"decode, {B} x 1", partial(lightning_case, device, B, 1)) for B in DECODE),
        *(("lightning", f"prefill, {B} x {T}", partial(lightning_case, device, B, T)) for B, T in PREFILL),
        *(("norm_residual", f"{M} rows, {S} summands", partial(norm_case, device, M, S)) for M, S in NORM),
        *(("router", f"{M} tokens", partial(router_case, device, M)) for M in ROUTER),
    ]


def whole(call: Callable[[], Made]) -> Tensor:
    """The result itself."""
    made = call()
    return made if isinstance(made, Tensor) else lightning.scaled(*made)


def lightning_case(device: torch.device, B: int, T: int) -> Case:
    """From the projections to the gated output, the state read and written; in float64 in blocks of 256 tokens."""
    nbytes = 2 * B * T * 5 * H * K + 2 * 4 * B * H * K * K
    slope = torch.tensor(geometric_slopes(H), device=device)
    weight = torch.rand(H * K, device=device) + 0.5
    inputs = [torch.randn(B, T, 4 * H * K, device=device).bfloat16() for _ in range(gpu.copies(nbytes))]
    states = [torch.randn(B, H, K, K, device=device) for _ in inputs]
    out = torch.cat([_lightning(x, slope, state, weight) for x, state in zip(inputs[0], states[0], strict=True)])

    def call(x: Tensor, state: Tensor) -> Made:
        return lightning.gated_with_factors(x, slope, state, weight, LIGHTNING_NORM_EPS, None)[:2]

    return [partial(call, x, state) for x, state in zip(inputs, states, strict=True)], out, nbytes


def _lightning(x_TP: Tensor, slope_H: Tensor, state_HKK: Tensor, weight: Tensor) -> Tensor:
    """One sequence in float64, [1, T, HK]."""
    qkv, gate = x_TP.double().split((3 * H * K, H * K), dim=-1)
    q, k, v = (qkv * torch.sigmoid(qkv)).view(1, -1, H, 3 * K).split(K, dim=-1)
    o = blocked.prefill(q, k, v, slope_H.double(), state_HKK[None].double(), None)[0].flatten(2)
    scale = torch.rsqrt(o.square().mean(-1, keepdim=True) + LIGHTNING_NORM_EPS)
    return o * scale * weight.double() * torch.sigmoid(gate)


def norm_case(device: torch.device, M: int, S: int) -> Case:
    """Summands in float32 as split products leave them, for many rows one in bfloat16."""
    few = M <= 64
    nbytes = 2 * 2 * M * D + (4 if few else 2) * S * M * D
    weight = torch.rand(D, device=device) + 0.5
    xs = [torch.randn(M, D, device=device).bfloat16() for _ in range(min(gpu.copies(nbytes), 400))]
    parts = [torch.randn(S, M, D, device=device).to(torch.float32 if few else torch.bfloat16) for _ in xs]
    h = ALPHA * xs[0].double() + BETA * parts[0].double().sum(0)
    expected = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight.double()
    calls = [partial(norm.norm_residual, x, part, ALPHA, BETA, weight, EPS) for x, part in zip(xs, parts, strict=True)]
    return calls, expected, nbytes


def router_case(device: torch.device, M: int) -> Case:
    """Compared are the weights; the same weights in every call, as a layer has them, would lie in the cache."""
    nbytes = 2 * M * D + 4 * E * D + 8 * M * A
    count = min(gpu.copies(nbytes), 400)
    ys = [torch.randn(M, D, device=device).bfloat16() for _ in range(count)]
    weights = [torch.randn(E, D, device=device) * D**-0.5 for _ in range(count)]
    expected = (ys[0].double() @ weights[0].double().t()).sort(-1, descending=True).values[:, :A].softmax(-1)

    def call(y: Tensor, weight: Tensor) -> Tensor:
        return router.route(y, weight, A)[1]

    return [partial(call, y, weight) for y, weight in zip(ys, weights, strict=True)], expected, nbytes


if __name__ == "__main__":
    main()
