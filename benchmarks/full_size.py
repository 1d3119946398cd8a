"""All 80 layers at their released size with random 4-bit weights, on as many GPUs as are named.

    python benchmarks/full_size.py --devices cuda:0,cuda:1 [--format nf4-dq] [--context 8192] [--batches 1,32]

First the logits of two layers, one on each device, must be those of the reference kernels.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from minibble.quantize.builtin import builtin_config
from minibble.runtime.bench import full, gpu
from minibble.runtime.bench.kernels import FORMATS
from minibble.runtime.bench.layers import random_model, real_config
from minibble.runtime.bench.whole import check_layers

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--format", default="nf4-dq", choices=FORMATS)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--chunks", default="2048,4096")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    devices = [gpu.the_gpu(name) for name in options.devices.split(",")]
    result = measure(devices, options)
    gpu.write_result(gpu.result_path(options.out, f"full_size_{len(devices)}x", result["hardware"][0]["gpu"]), result)


def measure(devices: list[torch.device], options: argparse.Namespace) -> dict[str, Any]:
    format = FORMATS[options.format]
    config = builtin_config("minimax-text-01")
    if options.layers != 80:
        config = real_config(tuple(int(i % 8 == 7) for i in range(options.layers)), vocab_size=200064)
    L = config.num_hidden_layers
    result: dict[str, Any] = {"hardware": [gpu.hardware(d) for d in devices], "versions": gpu.versions(), "layers": L}
    result["errors"] = check_layers(real_config((0, 1)), format, [devices[0], devices[-1]])
    torch.cuda.empty_cache()
    print(result["errors"])
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    started = perf_counter()
    model = random_model(config, format, [devices[i * len(devices) // L] for i in range(L)])
    for device in devices:
        torch.cuda.synchronize(device)
    result["load_s"] = perf_counter() - started
    result["loaded"] = full.gpu_bytes(devices)
    print(result["load_s"], result["loaded"])
    result["prefill"], result["decode"] = [], []
    with torch.inference_mode():
        for batch in (int(b) for b in options.batches.split(",")):
            row = full.decode_rate(model, batch, options.context if batch == 1 else 1024, options.steps)
            result["decode"].append(row | {"memory": full.gpu_bytes(devices)})
            print(json.dumps(result["decode"][-1]))
        for chunk in (int(c) for c in options.chunks.split(",")):
            model.prefill_chunk = chunk
            result["prefill"].append(full.prefill_rate(model, 8192) | {"memory": full.gpu_bytes(devices)})
            print(json.dumps(result["prefill"][-1]))
    return result


if __name__ == "__main__":
    main()
