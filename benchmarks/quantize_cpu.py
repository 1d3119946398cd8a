"""Rate of quantizing on the CPU, ours against bitsandbytes on the same matrices in the same run.

    python benchmarks/quantize_cpu.py [SOURCE] [--repeats 3]

SOURCE is a 16-bit checkpoint (default: a random one, made in a temporary folder). Rates are bytes of 16-bit source
per second over the 4-bit matrices. Nothing is measured unless codes and decoded weights agree.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from minibble.quantize.builtin import builtin_config, resolve_source
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.config import ModelConfig
from minibble.quantize.dummy import write_dummy
from minibble.quantize.inventory import quantized_roles
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.nf4 import NF4

RESULT = Path(__file__).parent / "results" / "quantize_cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = resolve_source(options.source) if options.source else _random_source(Path(folder) / "source")
        result = measure(source, Path(folder), options.repeats)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(source: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Gate, then medians over interleaved repeats, so that a busy machine slows all alike."""
    checkpoint = Checkpoint.open(source)
    specs = [spec for spec in checkpoint.inventory if spec.role in quantized_roles()]
    weights = [tensor for tensor in map(checkpoint.read, specs) if isinstance(tensor, Tensor)]
    scales_off = sum(map(_gate, weights)) / sum(weight.numel() // 64 for weight in weights)
    if scales_off > 0.005:
        raise SystemExit(f"not measured: {scales_off:.1%} of scales differ from those of bitsandbytes")
    nbytes = sum(weight.nbytes for weight in weights)
    times: dict[str, list[float]] = {"bitsandbytes": [], "encode": [], "end_to_end": []}
    for repeat in range(repeats):
        times["bitsandbytes"].append(_time(lambda: [_bitsandbytes(weight) for weight in weights]))
        times["encode"].append(_time(lambda: [NF4().encode(weight) for weight in weights]))
        out = folder / f"out{repeat}"
        times["end_to_end"].append(_time(lambda out=out: quantize_checkpoint(source, out, device="cpu")))
    seconds = {name: median(values) for name, values in times.items()}
    return {
        "what": "NF4 with double quantization on the CPU; end_to_end reads, checks, encodes, measures, hashes, writes",
        "hardware": {"cpu": _cpu(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("minibble", "torch", "bitsandbytes")},
        "matrices": len(weights),
        "source_bytes": nbytes,
        "scales_one_step_off_bitsandbytes": round(scales_off, 5),
        "repeats": repeats,
        "median_s": {name: round(value, 4) for name, value in seconds.items()},
        "GB_per_s": {name: round(nbytes / value / 1e9, 4) for name, value in seconds.items()},
        "encode_over_bitsandbytes": round(seconds["bitsandbytes"] / seconds["encode"], 3),
        "end_to_end_over_bitsandbytes": round(seconds["bitsandbytes"] / seconds["end_to_end"], 3),
    }


def _bitsandbytes(weight: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def _gate(weight: Tensor) -> int:
    """bitsandbytes decodes our tensors to our own bits, and chooses the same codes; else nothing is measured.

    Returns how many blocks' scales differ: its quantizer of scales is one step off the nearest where the scaled value
    lies within 3e-5 of the border of two steps, in about 0.1 % of blocks.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    format, q = NF4(), NF4().encode(weight)
    packed = format.pack("w", q)
    state = QuantState.from_dict({key[2:]: value for key, value in packed.items() if key != "w"}, torch.device("cpu"))
    codes, theirs = _bitsandbytes(weight)
    steps = (q.absmax.int() - theirs.absmax.int()).abs()
    if (
        not torch.equal(dequantize_4bit(packed["w"], state), format.decode(q, weight.dtype))
        or not torch.equal(codes, packed["w"])
        or steps.max() > 1
    ):
        raise SystemExit("not measured: our 4-bit weights differ from those of bitsandbytes")
    return int(steps.count_nonzero())


def _time(work: Callable[[], Any]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def _random_source(path: Path) -> Path:
    raw = builtin_config("minimax-text-01").raw
    raw |= {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 2, "attn_type_list": [0, 1]}
    raw |= {"num_attention_heads": 16, "head_dim": 64, "rotary_dim": 32, "vocab_size": 1024, "num_local_experts": 4}
    write_dummy(ModelConfig.from_dict(raw), path, format=None)
    return path


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
