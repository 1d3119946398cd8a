"""A prompt of 8192 tokens through whole layers of the released size on one GPU.

    python benchmarks/prefill_layers.py [--tokens 8192] [--chunks 1024,8192] [--layers 8]

Eight layers as the model has them with random weights, 24 GB; the model itself is called, its Python included, with
each of the given numbers of tokens at a time. Operations are counted exactly (runtime/bench/counts.py) and compared
with what cuBLAS reaches in bfloat16 in the same run. First the logits of two layers must be those of the reference
kernels.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from minibble.runtime.bench import gpu
from minibble.runtime.bench.counts import layer_flops
from minibble.runtime.bench.full import prefill_rate
from minibble.runtime.bench.kernels import FORMATS
from minibble.runtime.bench.layers import PATTERN, random_model, real_config
from minibble.runtime.bench.whole import check_layers, kernel_times_us
from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.plan import PREFILL_CHUNK_CUDA

RESULTS = Path(__file__).parent / "results"
LAYERS = 80  # of the released model
PEERS_TOKENS_PER_S = {
    "transformers with bitsandbytes, 80 layers (H200)": 2813,
    "transformers bf16, 80 layers (H200)": 3863,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=len(PATTERN), help="fewer where memory is short")
    parser.add_argument(
        "--chunks", default=f"{PREFILL_CHUNK_CUDA},8192", help="tokens at a time; the first is the model's own"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    device = gpu.the_gpu(options.device)
    chunks = [int(chunk) for chunk in options.chunks.split(",")]
    with torch.inference_mode():
        result = measure(device, options.tokens, chunks, PATTERN[-options.layers :])
    gpu.write_result(gpu.result_path(options.out, "prefill_layers", result["hardware"]["gpu"]), result)
    print(*lines(result), sep="\n")


def measure(device: torch.device, tokens: int, chunks: list[int], pattern: tuple[int, ...]) -> dict[str, Any]:
    """Both formats: errors, seconds, rates and shares for each chunk, and where the time goes for the last."""
    ceilings = gpu.ceilings(device)
    config = real_config(pattern)
    parts = [layer_flops(config, layer, tokens) for layer in range(len(pattern))]
    flops = {part: sum(layer[part] for layer in parts) for part in parts[0]}
    result: dict[str, Any] = {
        "what": f"seconds of {tokens} tokens through the layers, embedding and a small head included; tokens/s "
        f"as if all {LAYERS} layers took as long",
        "hardware": gpu.hardware(device),
        "versions": gpu.versions(),
        "ceilings": ceilings,
        "tokens": tokens,
        "layers": len(pattern),
        "flops": flops,
        "peers_tokens_per_s": PEERS_TOKENS_PER_S,
        "formats": {},
    }
    for name, format in FORMATS.items():
        errors = check_layers(real_config((0, 1)), format, device, prompt=(1, 700))
        torch.cuda.empty_cache()
        model = random_model(config, format, device)
        rows = []
        for chunk in chunks:
            model.prefill_chunk = chunk
            elapsed_s = prefill_rate(model, tokens)["seconds"]
            rows.append({"chunk": chunk} | figures(elapsed_s, tokens, len(pattern), sum(flops.values()), ceilings))
        profiled = kernel_times_us(lambda model=model: _prefill(model, tokens), len(pattern))
        result["formats"][name] = {"errors": errors, "rows": rows, "kernels_us": profiled}
        del model
        torch.cuda.empty_cache()
    return result


def figures(elapsed_s: float, tokens: int, layers: int, flops: int, ceilings: dict[str, float]) -> dict[str, float]:
    """What a time means."""
    rate = flops / elapsed_s / 1e12
    return {
        "seconds": round(elapsed_s, 5),
        "TFLOP_per_s": round(rate, 1),
        "share": round(rate / ceilings["bf16_TFLOP_per_s"], 4),
        "tokens_per_s": round(tokens / (elapsed_s / layers * LAYERS)),
    }


def _prefill(model: MiniMaxForCausalLM, tokens: int) -> None:
    ids = torch.randint(model.minibble.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    model(ids.to(model.device), use_cache=True, logits_to_keep=1)


def lines(result: dict[str, Any]) -> list[str]:
    """Everything, for a log."""
    text = [f"{result['hardware']['gpu']}: multiplies bf16 at {result['ceilings']['bf16_TFLOP_per_s']:.0f} TFLOP/s"]
    for name, found in result["formats"].items():
        text.append(f"{name}: errors {found['errors']}")
        text += [
            f"  chunks of {row['chunk']}: {1e3 * row['seconds']:.1f} ms, {row['TFLOP_per_s']:.0f} TFLOP/s "
            f"({row['share']:.0%}), {row['tokens_per_s']:,} tokens/s over {LAYERS} layers"
            for row in found["rows"]
        ]
        text += [f"    {us / 1e3:8.2f} ms  {kernel}" for kernel, us in list(found["kernels_us"].items())[:16]]
    return text


if __name__ == "__main__":
    main()
