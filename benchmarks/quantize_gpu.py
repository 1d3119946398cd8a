"""Rate of quantizing the real layer's matrices on a GPU: `python benchmarks/quantize_gpu.py [--device cuda:0]`.

Synthetic bfloat16 weights of the released sizes are made on the device and rotated past its L2 cache. Rates are bytes
of 16-bit source per second. Nothing is measured unless GPU and CPU agree on codes and decoded weights.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import minibble
from minibble.quantize.job import to_host
from minibble.quantize.measure import all_finite, relative_error
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode_absmax

RESULT = Path(__file__).parent / "results" / "quantize_gpu.json"

# [out, in] of w1/w3, w2, qkv, output gate or q, out or o; and how many a layer of 32 experts has.
MATRICES = {
    "w1, w3": ((9216, 6144), 64),
    "w2": ((6144, 9216), 32),
    "qkv": ((24576, 6144), 1),
    "output_gate": ((8192, 6144), 1),
    "out_proj": ((6144, 8192), 1),
}
_ROTATED_NBYTES = 1 << 30  # far more than any L2 cache
_GATE_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.cuda.set_device(device)
    result = measure(device, options.repeats)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(device: torch.device, repeats: int) -> dict[str, Any]:
    """Gate, then the median of each matrix's times, and the rate over a whole lightning layer."""
    rows = {}
    for name, (shape, count) in MATRICES.items():
        copies = max(2, _ROTATED_NBYTES // (2 * shape[0] * shape[1]))
        weights = [_weight(shape, device, seed) for seed in range(copies)]
        ties = _gate(weights[0])
        works: dict[str, Callable[[Tensor], Any]] = {"encode": NF4().encode, "checked": _checked, "to_host": _to_host}
        times = {
            "encode_ms": _cuda_ms(works["encode"], weights, repeats),
            "encode_checked_ms": _cuda_ms(works["checked"], weights, repeats),
            "to_host_ms": _wall_ms(works["to_host"], weights, repeats),
        }
        nbytes = weights[0].nbytes
        rates = {key.replace("_ms", "_GB_per_s"): round(nbytes / ms / 1e6, 2) for key, ms in times.items()}
        rows[name] = {"shape": list(shape), "count_in_layer": count, "codes_at_ties": ties}
        rows[name] |= {key: round(ms, 4) for key, ms in times.items()} | rates
        del weights
    return {
        "what": "encode: NF4.encode alone. encode_checked: finite check, encode, relative error. to_host: these, then "
        "codes and scales packed in pinned host memory (wall clock).",
        "hardware": {"gpu": torch.cuda.get_device_name(device), "driver": _driver(), "cpu": platform.machine()},
        "versions": {"minibble": minibble.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        "read_GB_per_s": round(_read_rate(device), 1),
        "repeats": repeats,
        "matrices": rows,
        "layer_GB_per_s": {
            key: round(_layer_rate(rows, f"{key}_ms"), 2) for key in ("encode", "encode_checked", "to_host")
        },
    }


def _weight(shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * shape[1] ** -0.5


def _gate(weight: Tensor) -> int:
    """Codes equal those of the CPU but for ties, and both decode the same codes to the same bits; returns the ties."""
    part = weight[:_GATE_ROWS]
    ours, reference = NF4().encode(part), NF4().encode(part.cpu())
    found, expected = ours.to("cpu"), reference
    differ = found.codes != expected.codes
    if differ.float().mean() > 1e-5 or (decode_absmax(found) - decode_absmax(expected)).abs().max() > 1e-3:
        raise SystemExit(f"not measured: {int(differ.sum())} codes differ from those of the CPU")
    for dtype in (torch.float32, torch.bfloat16):
        if not torch.equal(NF4().decode(ours, dtype).cpu(), NF4().decode(found, dtype)):
            raise SystemExit(f"not measured: GPU and CPU decode differently to {dtype}")
    return int(differ.sum())


def _checked(weight: Tensor) -> None:
    assert all_finite(weight)
    relative_error(NF4(), weight, NF4().encode(weight))


def _to_host(weight: Tensor) -> None:
    assert all_finite(weight)
    q = NF4().encode(weight)
    relative_error(NF4(), weight, q)
    to_host(NF4().pack("w", q))


def _cuda_ms(work: Callable[[Tensor], Any], weights: list[Tensor], repeats: int) -> float:
    work(weights[0])
    times = []
    for repeat in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work(weights[repeat % len(weights)])
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


def _wall_ms(work: Callable[[Tensor], Any], weights: list[Tensor], repeats: int) -> float:
    work(weights[0])
    times = []
    for repeat in range(repeats):
        torch.cuda.synchronize()
        started = perf_counter()
        work(weights[repeat % len(weights)])
        torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - started))
    return median(times)


def _read_rate(device: torch.device) -> float:
    """GB/s of reading 4 GiB: the ceiling."""
    data = torch.ones(1 << 29, dtype=torch.int64, device=device)
    return data.nbytes / _cuda_ms(torch.sum, [data], 10) / 1e6


def _layer_rate(rows: dict[str, Any], key: str) -> float:
    nbytes = sum(2 * row["shape"][0] * row["shape"][1] * row["count_in_layer"] for row in rows.values())
    return nbytes / sum(row[key] * row["count_in_layer"] for row in rows.values()) / 1e6


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


if __name__ == "__main__":
    main()
