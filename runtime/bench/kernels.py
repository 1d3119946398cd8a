"""The kernels of the model, measured on one GPU: `minibble bench` and `benchmarks/kernels.py`."""

from collections.abc import Callable
from typing import Any

import torch

from minibble.quantize.formats import Format
from minibble.quantize.int4 import Int4
from minibble.quantize.nf4 import NF4
from minibble.runtime.bench import gpu, lightning, linear, moe
from minibble.runtime.bench.check import BOUND, PEER_BOUND

FORMATS: dict[str, Format] = {"nf4-dq": NF4(), "int4-g128": Int4(128)}

Progress = Callable[[float, float, str], None]


def measure(device: torch.device, *, quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """linear4 and moe4 in both formats beside their peers on `device`, and lightning attention beside its floors.

    Shares and floors are of what the GPU reached in the same run. `quick` takes few numbers of tokens. `progress` gets
    what is done, of how much, and what is in work. Raises WrongResult if one of our kernels is off by more than BOUND.
    """
    linear_tokens, moe_tokens = (linear.QUICK_TOKENS, moe.QUICK_TOKENS) if quick else (linear.TOKENS, moe.TOKENS)
    runs = lightning.QUICK_RUNS if quick else lightning.RUNS
    total = 1 + 5 * len(linear_tokens) + 4 * len(moe_tokens) + len(runs)  # kernels, if every peer is there
    done = 0

    def tell(current: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, current)
        done += 1

    with torch.inference_mode():
        tell("bandwidth")
        ceilings = gpu.ceilings(device)
        read = ceilings["read_GB_per_s"]
        result = {
            "what": "medians of CUDA graphs' replays, weights in turn past the L2 cache; bytes are codes and scales",
            "hardware": gpu.hardware(device),
            "versions": gpu.versions(),
            "ceilings": ceilings,
            "bounds": {"ours": BOUND, "peers": PEER_BOUND},
            "quick": quick,
            "formats": list(FORMATS),
            "linear4": linear.measure(FORMATS, linear_tokens, device, read, tell),
        }
        torch.cuda.empty_cache()
        result["moe4"] = moe.measure(FORMATS, moe_tokens, device, read, tell)
        torch.cuda.empty_cache()
        result["lightning"] = lightning.measure(runs, device, ceilings, tell)
    if progress is not None:
        progress(total, total, "done")
    return result
