"""Decoding on the CPU: a checkpoint in NF4 through minibble against transformers in bf16, in the same run.

    python benchmarks/decode_cpu.py [CHECKPOINT] [--new-tokens 128] [--repeats 3] [--threads N]

CHECKPOINT is a 16-bit checkpoint with a tokenizer (default: the trained reference-a beside the repository, or in
MINIBBLE_SHARED). Greedy, one sequence, with a cache, both through `generate()`; the rate is that of the tokens after
the first. transformers gets the same weights, its rotary embedding mended; float32 and our own 16-bit runs are there
for information. Nothing is measured unless our float32 logits equal transformers' in float32 and NF4 is close.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minibble.quantize.config import ModelConfig
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime.bench.full import Clock
from minibble.runtime.kernels.linear4 import cpu
from minibble.runtime.loading import load

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "decode_cpu.json"
PROMPT = "Abstract\n========\n\nThis PEP proposes a new way to write functions that return more than one value. "
LOGITS_BOUND = 1e-4  # of the largest logit
KL_BOUND = 0.05  # nats a token; NF4 of a trained model has about 0.01
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = options.checkpoint or _reference()
    with tempfile.TemporaryDirectory() as folder:
        quantize_checkpoint(checkpoint, Path(folder) / "nf4")
        result = measure(checkpoint, Path(folder) / "nf4", options.new_tokens, options.repeats)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(checkpoint: Path, nf4: Path, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Gate, then medians over interleaved repeats, so that a busy machine slows all alike."""
    sys.path.insert(0, str(ROOT / "tests"))
    from golden import transformers_oracle

    config = ModelConfig.from_file(checkpoint / "config.json")
    weights = {name: tensor for shard in checkpoint.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    models = {
        "minibble nf4": load(nf4, device="cpu"),
        "transformers bf16": transformers_oracle.build(config, weights, torch.bfloat16),
        "transformers float32": transformers_oracle.build(config, weights, torch.float32),
        "minibble 16-bit weights, float32": load(checkpoint, device="cpu", dtype=torch.float32),
    }
    prompt = models["minibble nf4"].tokenizer.encode(PROMPT, add_special_tokens=False)
    ids = torch.tensor([prompt])
    gate = _gate(models, torch.tensor([(prompt * 12)[:256]]))
    rates: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            rate = decode_rate(model, ids, new_tokens)
            if repeat:  # the first round warms up
                rates[name].append(rate)
    medians = {name: round(median(values), 2) for name, values in rates.items()}
    return {
        "what": f"greedy decoding of {new_tokens} tokens after {len(prompt)}, one sequence, tokens per second",
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "tokens_per_s": medians,
        "all_runs": {name: [round(value, 2) for value in values] for name, values in rates.items()},
        "nf4_over_transformers_bf16": round(medians["minibble nf4"] / medians["transformers bf16"], 3),
        "gate": gate,
        "machine": _machine(str(models["minibble nf4"].dtype)),
    }


@torch.inference_mode()
def decode_rate(model: Any, ids: Tensor, new_tokens: int) -> float:
    """Tokens per second after the first one."""
    clock = Clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        streamer=clock,
    )
    _, first, *_ = clock.times
    assert len(clock.times) == new_tokens + 1, f"{len(clock.times) - 1} tokens instead of {new_tokens}"
    return (new_tokens - 1) / (clock.times[-1] - first)


@torch.inference_mode()
def _gate(models: dict[str, Any], ids: Tensor) -> dict[str, float]:
    """Our float32 logits against transformers', and the KL divergence of NF4; exits where either is wrong."""
    theirs = models["transformers float32"](input_ids=ids, use_cache=False).logits[0]
    ours = models["minibble 16-bit weights, float32"](input_ids=ids, use_cache=False).logits[0]
    nf4 = models["minibble nf4"](input_ids=ids, use_cache=False).logits[0]
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    p, q = theirs.double().log_softmax(-1), nf4.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    if not (error < LOGITS_BOUND and kl < KL_BOUND):
        sys.exit(f"not measured: logits differ by {error:.2e} (bound {LOGITS_BOUND}), KL {kl:.4f} (bound {KL_BOUND})")
    return {"max_relative_logit_error_float32": error, "kl_nf4": round(kl, 5)}


def _reference() -> Path:
    folder = Path(os.environ.get("MINIBBLE_SHARED", ROOT.parent / "shared")) / "models" / "reference-a"
    if not folder.is_dir():
        sys.exit("no reference-a: give a 16-bit checkpoint, or set MINIBBLE_SHARED to the folder that holds models/")
    return folder


def _machine(dtype: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [feature for feature in FEATURES if feature in flags],
        "nf4_path": cpu.path(),
        "nf4_activations": dtype.removeprefix("torch."),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "bitsandbytes")},
    }


if __name__ == "__main__":
    main()
