"""Quality through the GPU's kernels beside that through the reference ones.

    python benchmarks/quality_gpu.py SOURCE --text FILE [--calibration FILE] [--windows 176]

SOURCE becomes NF4, and with --calibration int4 too. Each is scored against SOURCE three times on the same windows: by
the reference kernels, by the kernels for many tokens (a window at once), and by a graph a token, 8 windows at a time.
Gate: each KL divergence within 1 % of the reference kernels'. Rounding sends some tokens to other experts, so fewer
windows tell less: 8 of them may differ by 2 %.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.calibrate.job import quantize
from minibble.runtime import evaluate as scoring
from minibble.runtime.bench import gpu
from minibble.runtime.bench.check import kernels
from minibble.runtime.loading import load
from minibble.runtime.model import MiniMaxForCausalLM

RESULTS = Path(__file__).parent / "results"
BOUND = 0.01
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=176)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = gpu.the_gpu()
    result: dict[str, Any] = {"source": options.source.name, "hardware": gpu.hardware(device), "formats": {}}
    ways: dict[str, dict[str, Any]] = {"nf4-dq": {}}
    if options.calibration is not None:
        ways["int4-g128"] = {"method": "gptq", "calibration": options.calibration}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways.items():
            quantize(options.source, Path(folder) / name, device=str(device), **way)
            result["formats"][name] = measure(Path(folder) / name, options, device)
            gpu.write_result(gpu.result_path(options.out, "quality_gpu", result["hardware"]["gpu"]), result)
            print(name, result["formats"][name], flush=True)
    for name, row in result["formats"].items():
        worst = max(abs(row["many_tokens_ratio"] - 1), abs(row["single_tokens_ratio"] - 1))
        assert worst < BOUND, f"{name}: KL divergence {worst:.2%} from the reference kernels'"


def measure(path: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Scores by each set of kernels, and KL divergences over that of the reference kernels."""
    with kernels("reference"):
        reference = scoring.evaluate(path, options.text, options.source, device=device, max_windows=options.windows)
    many = scoring.evaluate(path, options.text, options.source, device=device, max_windows=options.windows)
    single = kl_by_single_tokens(path, options, device)
    assert reference.kl and many.kl
    return {
        "reference": asdict(reference),
        "many_tokens": asdict(many),
        "many_tokens_ratio": many.kl / reference.kl,
        "single_tokens": {"kl": single},
        "single_tokens_ratio": single / reference.kl,
    }


@torch.no_grad()
def kl_by_single_tokens(path: Path, options: argparse.Namespace, device: torch.device) -> float:
    """Mean KL divergence of decode steps, BATCH windows at once, from SOURCE's predictions by the reference kernels."""
    model = load(path, device=device)
    with kernels("reference"):
        source = load(options.source, device=device)
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for windows in torch.stack(scoring._windows(model, options.text, 512, options.windows)).to(device).split(BATCH):
        with kernels("reference"):
            theirs = torch.stack([source(window[None], use_cache=False).logits[0, :-1] for window in windows])
        for position, own in enumerate(steps(model, windows[:, :-1])):
            p, q = theirs[:, position].log_softmax(-1), own.log_softmax(-1)
            total += (p.exp() * (p - q)).double().sum()
            count += len(windows)
    assert model.decode_path().get("graph", 0) > 0.9 * count / BATCH, f"no graphs: {model.decode_path()}"
    return float(total) / count


def steps(model: MiniMaxForCausalLM, ids_BT: Tensor) -> Iterator[Tensor]:
    """Logits [B, V] after each token, fed one by one."""
    state = None
    for position in range(ids_BT.shape[1]):
        output = model(ids_BT[:, position : position + 1], past_key_values=state, use_cache=True)
        state = output.past_key_values
        yield output.logits[:, -1]


if __name__ == "__main__":
    main()
