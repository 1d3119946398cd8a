"""Quality through the GPU's kernels beside that through the reference ones.

    python benchmarks/quality_gpu.py SOURCE --text FILE [--calibration FILE] [--windows 176]

SOURCE becomes NF4, and with --calibration int4 too. KL divergences from SOURCE on the same windows: by the reference
kernels in float32, which leaves what the 4 bits do and nothing else; by the same in bfloat16; by the kernels for many
tokens, windows at once; and by a graph a token, from what SOURCE says in float32. bfloat16 alone adds 1 to 1.5 %. Gate:
those through the GPU's kernels at most 1 % above what the reference kernels give in bfloat16, and no more than 1 %
below what they give in float32. Rounding sends some tokens to other experts, so fewer windows tell less.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
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
LENGTH = 512
BATCH = 16  # windows side by side

# Log-probabilities [B, V] after each token but the last of windows [B, T], one position after the other.
Predicted = Callable[[Tensor], Iterator[Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=176)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = gpu.the_gpu()
    windows = torch.stack(scoring._windows(load(options.source, device="cpu"), options.text, LENGTH, options.windows))
    result: dict[str, Any] = {
        "source": options.source.name, "tokens": windows[:, 1:].numel(), "hardware": gpu.hardware(device), "formats": {}
    }  # fmt: skip
    ways: dict[str, dict[str, Any]] = {"nf4-dq": {}}
    if options.calibration is not None:
        ways["int4-g128"] = {"method": "gptq", "calibration": options.calibration}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways.items():
            quantize(options.source, Path(folder) / name, device=str(device), **way)
            result["formats"][name] = measure(Path(folder) / name, options.source, windows.to(device))
            gpu.write_result(gpu.result_path(options.out, "quality_gpu", result["hardware"]["gpu"]), result)
            print(name, result["formats"][name], flush=True)
    for name, row in result["formats"].items():
        for way in ("many_tokens", "single_tokens"):
            assert row[way] < (1 + BOUND) * row["bfloat16"], f"{name}, {way}: KL divergence {row[way]:.6f}"
            assert row[way] > (1 - BOUND) * row["float32"], f"{name}, {way}: KL divergence {row[way]:.6f}"


def measure(path: Path, source: Path, windows_WT: Tensor) -> dict[str, float]:
    """KL divergences from SOURCE, in nats, by each way through the model."""
    found = {}
    with kernels("reference"):
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            both = [at_once(load(one, device=windows_WT.device, dtype=dtype)) for one in (path, source)]
            found[name] = divergence(*both, windows_WT)
        exact = load(source, device=windows_WT.device, dtype=torch.float32)
    model, rounded = (load(one, device=windows_WT.device, dtype=torch.bfloat16) for one in (path, source))
    found["many_tokens"] = divergence(at_once(model), at_once(rounded), windows_WT)
    found["single_tokens"] = divergence(by_steps(model), at_once(exact), windows_WT)
    steps, taken = windows_WT[::BATCH, 1:].numel(), model.decode_path()
    assert taken.get("graph", 0) > 0.9 * steps, f"no graphs: {taken}"
    return found


@torch.no_grad()
def divergence(own: Predicted, theirs: Predicted, windows_WT: Tensor) -> float:
    """Mean KL divergence of `own` predictions from `theirs`."""
    total = torch.zeros((), dtype=torch.float64, device=windows_WT.device)
    for windows in windows_WT.split(BATCH):
        for q, p in zip(own(windows), theirs(windows), strict=True):
            total += (p.exp() * (p - q)).double().sum()
    return float(total) / windows_WT[:, 1:].numel()


def at_once(model: MiniMaxForCausalLM) -> Predicted:
    """All positions in one pass."""

    def predicted(windows_BT: Tensor) -> Iterator[Tensor]:
        logits = model(windows_BT[:, :-1], use_cache=False).logits
        return (logits[:, position].log_softmax(-1) for position in range(logits.shape[1]))

    return predicted


def by_steps(model: MiniMaxForCausalLM) -> Predicted:
    """Token by token over a state."""

    def predicted(windows_BT: Tensor) -> Iterator[Tensor]:
        state = None
        for position in range(windows_BT.shape[1] - 1):
            output = model(windows_BT[:, position : position + 1], past_key_values=state, use_cache=True)
            state = output.past_key_values
            yield output.logits[:, -1].log_softmax(-1)

    return predicted


if __name__ == "__main__":
    main()
