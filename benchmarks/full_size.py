"""All 80 layers at their released size with random 4-bit weights, within a budget of GPU memory.

    python benchmarks/full_size.py --name 2x --devices cuda:0,cuda:1 --runs 228GiB:uniform,228GB:zipf --batches 1,32
    python benchmarks/full_size.py --name 1x --runs all:uniform,all:uniform+cpu  # hosts differ: in one run

First the logits of two layers, the second on the last device, must be those of the reference kernels, and with a
third of the experts off the GPU they must be the same to the bit; with parts of those on the CPU, but for rounding.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from minibble.quantize.builtin import builtin_config
from minibble.quantize.sizes import parse_size
from minibble.runtime.bench import full, gpu, tables
from minibble.runtime.bench.layers import real_config

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the result: full_size_NAME_GPU.json")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument(
        "--runs", default="all:uniform",
        help="GPU memory, such as 228GB, and routing, uniform or zipf; +cpu lets the CPU compute missing experts",
    )  # fmt: skip
    parser.add_argument("--host-memory", type=parse_size, help="bytes of host memory to pin at most")
    parser.add_argument("--folder", type=Path, help="for experts that wait on disk")
    parser.add_argument("--format", default="nf4-dq")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--layers", type=int, help="fewer, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    say = partial(print, file=sys.stderr)
    devices = gpu.the_gpus(options.devices)
    result = {
        "hardware": [gpu.hardware(device) for device in devices],
        "versions": gpu.versions(),
        "errors": full.gate(devices, options.format, say, "+cpu" in options.runs),
        "runs": [],
    }
    config = builtin_config("minimax-text-01")
    if options.layers:
        config = real_config(tuple(int(i % 8 == 7) for i in range(options.layers)), vocab_size=config.vocab_size)
    for memory, routing in (asked.split(":") for asked in options.runs.split(",")):
        routing, _, cpu = routing.partition("+")
        if cpu not in ("", "cpu"):
            parser.error(f"--runs: +{cpu} is unknown, there is +cpu")
        run = full.Run(
            format=options.format, gpu_memory=None if memory == "all" else parse_size(memory),
            host_memory=options.host_memory,
            folder=options.folder, cpu_experts=cpu == "cpu", routing=routing,
            context=options.context, steps=options.steps,
            batches=tuple(map(int, options.batches.split(","))), prompt=options.prompt, prefill_chunk=options.chunk,
        )  # fmt: skip
        result["runs"].append(full.measure(config, devices, run, say))
        path = gpu.result_path(options.out, f"full_size_{options.name}", result["hardware"][0]["gpu"])
        gpu.write_result(path, result)  # after every run: what comes next may not fit
        print(*tables.whole(result["runs"][-1]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
