"""A real layer calibrated on a GPU: `python benchmarks/calibrate_gpu.py [--gpu-memory 24GB]`.

Synthetic weights of the released sizes lie in host memory, as they come from disk; synthetic activations of 128 x 2048
tokens go in. Measured is all that `minibble quantize --calibration` does for a layer but reading and writing files:
once undisturbed, once with a clock in each stage. Gates: a slice solved by the torch kernels must give the same error,
errors must be those of what is stored and a fraction of nearest rounding's, and the plan must hold.
"""

import argparse
import json
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as `minibble quantize` does
import torch
from torch import Tensor

import minibble
from minibble.calibrate import hessian, matrices, solver
from minibble.calibrate.layer import LayerPass
from minibble.calibrate.matrices import Settled
from minibble.calibrate.plan import Budget, CalibrationPlan, plan_calibration
from minibble.calibrate.setup import Setup
from minibble.calibrate.solver import SolverSettings
from minibble.calibrate.stores import Stores, make_stores, spans
from minibble.quantize.builtin import builtin_config
from minibble.quantize.inventory import TensorSpec, inventory
from minibble.quantize.job import to_host
from minibble.quantize.settings import make_settings
from minibble.quantize.sizes import parse_size
from minibble.runtime.kernels import feedback
from minibble.runtime.kernels.feedback import columns, stepwise

RESULTS = Path(__file__).parent / "results"
SAMPLES, SEQ_LEN = 128, 2048
FLOOR_S = 6.0  # of a layer on an H100, derived: 8 minutes for 80 layers
STAGES = {
    "hessian": (hessian.Hessians, "_add"),
    "factorisation": (solver, "factor"),
    "scale search": (solver, "search_scales"),
    "column loop": (solver, "feed_back"),
    "sweeps": (solver, "descend"),
    "errors": (solver, "quadratic"),
    "upload": (matrices.LayerMatrices, "_stacked"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-memory", type=parse_size, help="bound, enforced; default: what an 80 GB card has")
    parser.add_argument("--method", default="nf4")
    parser.add_argument("--layer", type=int, default=0, help="0 is a lightning layer, 7 a softmax one")
    parser.add_argument("--name", default="calibrate_gpu")
    options = parser.parse_args()
    result = measure(options.gpu_memory or parse_size("78GiB"), options.method, options.layer)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(budget_bytes: int, method: str, index: int) -> dict[str, Any]:
    """Both runs, with the GPU's memory bounded to `budget_bytes`."""
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(budget_bytes / total, device)
    setup = _setup(device, budget_bytes, method)
    specs = [spec for spec in inventory(setup.config) if spec.layer == index]
    tensors = _weights(specs)
    stores = make_stores(setup, Path("."))
    with torch.inference_mode():
        same = _gate_kernels(setup)
        _run(setup, index, specs, tensors, stores, experts=setup.plan.experts_at_once)  # warm
        torch.cuda.reset_peak_memory_stats()
        elapsed_s, errors = _run(setup, index, specs, tensors, stores)
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        with _clocks() as stages:
            clocked_s, _ = _run(setup, index, specs, tensors, stores, stages)
    stages["forward and the rest"] = clocked_s - sum(stages.values())
    _check(errors, reserved, budget_bytes)
    return {
        "what": f"layer {index} of the released model, {method}, {SAMPLES} x {SEQ_LEN} tokens, all but files",
        "hardware": {"gpu": torch.cuda.get_device_name(device), "driver": _driver()},
        "versions": {"minibble": minibble.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        "layer_s": round(elapsed_s, 2),
        "layers_80_min": round(elapsed_s * 80 / 60, 1),
        "floor_h100_s": FLOOR_S,
        "stages_s": {name: round(seconds, 3) for name, seconds in stages.items()},
        "clocked_layer_s": round(clocked_s, 2),
        "peak_allocated_GB": round(peak / 1e9, 2),
        "peak_reserved_GB": round(reserved / 1e9, 2),
        "predicted_GB": round(setup.plan.gpu_bytes / 1e9, 2),
        "bound_GB": round(budget_bytes / 1e9, 2),
        "plan": setup.plan.to_json(),
        "gate": {"mean_output_error": sum(errors) / len(errors), "matrices": len(errors), "kernels": same},
    }


def _setup(device: torch.device, budget_bytes: int, method: str) -> Setup:
    config = builtin_config("minimax-text-01")
    plan: CalibrationPlan = plan_calibration(
        config, SAMPLES, SEQ_LEN, device, Budget(budget_bytes, int(90e9), int(50e9))
    )
    return Setup(
        config, make_settings(method).format, SolverSettings(), plan, SEQ_LEN, device, torch.bfloat16,
        strict=True, router_weights=True, where=str,
    )  # fmt: skip


def _weights(specs: list[TensorSpec]) -> dict[str, Tensor]:
    """Normal weights of deviation 1/sqrt(K) in host memory, pinned as the reader's are; each expert its own."""
    generator = torch.Generator("cuda").manual_seed(0)
    weights = {}
    for spec in specs:
        if spec.role == "norm":
            weights[spec.name] = torch.ones(spec.shape, dtype=torch.bfloat16)
            continue
        made = torch.randn(spec.shape, generator=generator, device="cuda").mul_(spec.shape[-1] ** -0.5).bfloat16()
        weights[spec.name] = torch.empty(spec.shape, dtype=torch.bfloat16, pin_memory=True).copy_(made)
    return weights


def _activations(stores: Stores, seed: int) -> None:
    """Correlated tokens: a thousand directions, of falling weight, and noise."""
    generator = torch.Generator("cuda").manual_seed(seed)
    D = stores.hidden.shape[1]
    directions = torch.randn(1024, D, generator=generator, device="cuda")
    directions *= torch.logspace(0, -2, 1024, device="cuda")[:, None]
    for rows in spans(len(stores.hidden), 16384):
        count = rows.stop - rows.start
        x = torch.randn(count, 1024, generator=generator, device="cuda") @ directions
        x += torch.randn(count, D, generator=generator, device="cuda")
        stores.hidden[rows] = x.to(stores.hidden)


def _run(
    setup: Setup, index: int, specs: list[TensorSpec], tensors: dict[str, Tensor], stores: Stores,
    stages: dict[str, float] | None = None, experts: int | None = None,
) -> tuple[float, list[float]]:  # fmt: skip
    """Seconds, and the output error of each matrix; `experts` bounds how many are done."""
    _activations(stores, seed=1)
    torch.cuda.synchronize()
    started, errors = time.perf_counter(), []

    def store(settled: dict[str, Settled]) -> None:
        begun = time.perf_counter()
        for name, one in settled.items():
            to_host(setup.format.pack(name, one.q))
            assert one.record is not None
            errors.append(one.record["output_error"])
        if stages is not None:
            stages["packing"] += time.perf_counter() - begun

    current = LayerPass(setup, index, stores)
    store(current.attend(tensors))
    for part in spans(experts or setup.config.num_experts, setup.plan.experts_at_once):
        store(current.run_experts(range(part.start, part.stop), tensors))
    current.close()
    torch.cuda.synchronize()
    return time.perf_counter() - started, errors


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each of STAGES, the GPU's work waited for on either side."""
    seconds: dict[str, float] = defaultdict(float)
    plain = {stage: getattr(*place) for stage, place in STAGES.items()}

    def clocked(stage: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            value = plain[stage](*args, **kwargs)
            torch.cuda.synchronize()
            seconds[stage] += time.perf_counter() - begun
            return value

        return run

    for stage, (owner, name) in STAGES.items():
        setattr(owner, name, clocked(stage))
    try:
        yield seconds
    finally:
        for stage, (owner, name) in STAGES.items():
            setattr(owner, name, plain[stage])


def _gate_kernels(setup: Setup) -> dict[str, float]:
    """A slice of a real matrix, 64 rows of 6144 columns, through the Triton kernels and through torch's."""
    generator = torch.Generator("cuda").manual_seed(2)
    K = setup.config.hidden_size
    x = torch.randn(16384, 1024, generator=generator, device="cuda") @ torch.randn(
        1024, K, generator=generator, device="cuda"
    )
    x = (x / 32 + torch.randn(16384, K, generator=generator, device="cuda")).bfloat16()
    H = torch.mm(x.t(), x, out_dtype=torch.float32)[None]
    W = torch.randn(1, K, 64, generator=generator, device="cuda") * K**-0.5
    nearest = setup.format.decode(setup.format.encode(W[0].t().contiguous())).t()[None]
    off = W - nearest
    rounding = float((torch.bmm(H, off) * off).sum() / (torch.bmm(H, W) * W).sum())
    errors = {}
    for name, kernels in (("triton", columns), ("torch", stepwise)):
        chosen, feedback._kernels = feedback._kernels, lambda device, kernels=kernels: kernels
        try:
            [[part]] = solver.solve(W.clone(), H.clone(), [64], setup.format, setup.solver, torch.bfloat16)
        finally:
            feedback._kernels = chosen
        errors[name] = part.output_error
        decoded = setup.format.decode(part.q).t()[None]
        stored = float((torch.bmm(H, W - decoded) * (W - decoded)).sum() / (torch.bmm(H, W) * W).sum())
        if abs(stored / part.output_error - 1) > 0.01:
            raise SystemExit(f"not measured: what is stored has an error of {stored}, told was {part.output_error}")
    if abs(errors["triton"] / errors["torch"] - 1) > 0.01 or errors["triton"] > 0.6 * rounding:
        raise SystemExit(f"not measured: errors {errors}, nearest rounding {rounding}")
    return errors | {"nearest": rounding}


def _check(errors: list[float], reserved: int, budget_bytes: int) -> None:
    if not all(0 < error < 0.01 for error in errors):
        raise SystemExit(f"not valid: output errors from {min(errors)} to {max(errors)}")
    if reserved > budget_bytes:
        raise SystemExit(f"not valid: {reserved} bytes taken, {budget_bytes} allowed")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


if __name__ == "__main__":
    main()
