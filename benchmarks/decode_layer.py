"""A token through whole layers of the released size on one GPU, in a CUDA graph.

    python benchmarks/decode_layer.py [--context 4096] [--batches 1,2,4,8,16,32]

Eight layers as the model has them, seven lightning and one softmax, with random weights, 24 GB. A layer's time is an
eighth of the graph's less what the embedding, the last norm and a small head take. First the logits of two such
layers must be those of the reference kernels.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minibble.quantize.formats import Format
from minibble.runtime.bench import gpu
from minibble.runtime.bench.counts import decode_nbytes
from minibble.runtime.bench.kernels import FORMATS
from minibble.runtime.bench.layers import PATTERN, random_model, random_state, real_config
from minibble.runtime.bench.whole import check_layers, kernel_times_us, step_inputs
from minibble.runtime.decode import decode_step
from minibble.runtime.model import MiniMaxForCausalLM

RESULTS = Path(__file__).parent / "results"
PEER_US = {"transformers with bitsandbytes, expert by expert (H200)": 2000}  # 160 ms a token of 80 layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--context", type=int, default=4096, help="tokens that the softmax layer sees")
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    device = gpu.the_gpu(options.device)
    batches = [int(batch) for batch in options.batches.split(",")]
    with torch.inference_mode():
        result = measure(device, options.context, batches)
    gpu.write_result(gpu.result_path(options.out, "decode_layer", result["hardware"]["gpu"]), result)
    print(*lines(result), sep="\n")


def measure(device: torch.device, context: int, batches: list[int]) -> dict[str, Any]:
    """Both formats: errors, microseconds of a layer at every batch, and where a step's time goes at the first."""
    ceilings = gpu.ceilings(device)
    result: dict[str, Any] = {
        "what": "microseconds a layer, mean of 7 lightning and 1 softmax, median of a CUDA graph's replays",
        "hardware": gpu.hardware(device),
        "versions": gpu.versions(),
        "ceilings": ceilings,
        "context": context,
        "peers_us": PEER_US,
        "formats": {},
    }
    for name, format in FORMATS.items():
        errors = check_layers(real_config((0, 1)), format, device)
        torch.cuda.empty_cache()
        model = random_model(real_config(), format, device)
        rows = [_row(model, format, batch, context, ceilings["read_GB_per_s"]) for batch in batches]
        result["formats"][name] = {
            "errors": errors, "rows": rows, "kernels_us_a_step": _profile(model, batches[0], context)
        }  # fmt: skip
        del model
        torch.cuda.empty_cache()
    return result


def _row(model: MiniMaxForCausalLM, format: Format, batch: int, context: int, read: float) -> dict[str, Any]:
    whole, rest = step_us(model, batch, context), _without_layers_us(model, batch, context)
    us = (whole - rest) / len(PATTERN)
    row = {"batch": batch, "us": round(us, 2), "step_us": round(whole, 1), "rest_us": round(rest, 1)}
    if batch == 1:
        layers = range(len(PATTERN))
        nbytes = sum(sum(decode_nbytes(model.minibble, i, format, context).values()) for i in layers) / len(PATTERN)
        floor = nbytes / read / 1e3
        row |= {"nbytes": round(nbytes), "floor_us": round(floor, 2), "share": round(floor / us, 4)}
    return row


def step_us(model: MiniMaxForCausalLM, batch: int, context: int) -> float:
    """Microseconds of a decode step."""
    state = random_state(model, batch, context)
    ids = torch.randint(model.minibble.vocab_size, (batch,), generator=torch.Generator().manual_seed(batch))
    inputs = step_inputs(model, ids.to(model.device), state)
    return gpu.graph_us([lambda: decode_step(model, inputs, state)])


def _without_layers_us(model: MiniMaxForCausalLM, batch: int, context: int) -> float:
    layers, model.layers = model.layers, nn.ModuleList()
    try:
        return step_us(model, batch, context)
    finally:
        model.layers = layers


def _profile(model: MiniMaxForCausalLM, batch: int, context: int) -> dict[str, float]:
    state = random_state(model, batch, context)
    inputs = step_inputs(model, torch.arange(batch, device=model.device), state)
    return kernel_times_us(lambda: decode_step(model, inputs, state), len(PATTERN))


def lines(result: dict[str, Any]) -> list[str]:
    """Everything, for a log."""
    read = result["ceilings"]["read_GB_per_s"]
    text = [f"{result['hardware']['gpu']}: reads {read:,.0f} GB/s; context {result['context']}"]
    for name, found in result["formats"].items():
        text.append(f"{name}: errors {found['errors']}")
        text += [
            f"  batch {row['batch']:3}: {row['us']:8.1f} us a layer"
            + (f", floor {row['floor_us']:.1f} ({row['share']:.0%})" if "share" in row else "")
            for row in found["rows"]
        ]
        text += [f"    {us:8.1f} us  {kernel}" for kernel, us in list(found["kernels_us_a_step"].items())[:16]]
    return text


if __name__ == "__main__":
    main()
