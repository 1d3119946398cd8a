"""A GPU as a measuring instrument: which one it is, what its ceilings are, how long a call takes."""

import json
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import minibble
from minibble.quantize.errors import ConfigError

Call = Callable[[], Any]

ROTATED_NBYTES = 512 << 20  # that calls in turn read; a Hopper's L2 cache holds 50 or 60 MB
READ_NBYTES = 4 << 30
MATRIX = 8192
_GRAPH_US = 1000.0  # a graph shorter than this would show its own launch
_MEASURED_US = 2e5
_REPLAYS = (5, 40)  # least and most


def the_gpu(device: str | None = None) -> torch.device:
    """The CUDA device called `device`, by default the first, made the current one; ConfigError if there is none."""
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU that torch can use: the kernels measured here are for CUDA GPUs")
    try:
        chosen = torch.device(device or "cuda")
    except RuntimeError as error:
        raise ConfigError(f"device '{device}' is unknown: use cuda or cuda:N") from error
    if chosen.type != "cuda" or (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}' is no GPU that torch sees; there are {torch.cuda.device_count()}")
    torch.cuda.set_device(chosen.index or 0)
    return torch.device("cuda", chosen.index or 0)


def the_gpus(devices: str | None = None) -> list[torch.device]:
    """Those named in `devices`, such as cuda:0,cuda:1, each once."""
    return list(dict.fromkeys(the_gpu(name.strip()) for name in (devices or "cuda").split(",")))


def graph_us(calls: Sequence[Call]) -> float:
    """Median microseconds of a call, all `calls` captured one after the other in a graph that is replayed.

    They should read different memory, more of it together than the L2 cache holds.
    """
    for call in calls:  # compiles, and finds what depends on sizes
        call()
    once_us = _eager_us(calls)
    repeated = list(calls) * max(1, round(_GRAPH_US / once_us))
    least, most = _REPLAYS
    replays = min(max(least, round(_MEASURED_US / max(once_us, _GRAPH_US))), most)
    return _replay_us(_captured(repeated), replays) / len(repeated)


def _eager_us(calls: Sequence[Call]) -> float:
    """How long one pass over `calls` takes, gaps between launches included: capturing only to learn this is slower."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median of replays that follow each other, so that none waits for its launch."""
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return 1e3 * median(a.elapsed_time(b) for a, b in pairwise(events))


def copies(nbytes: int) -> int:
    """How many buffers of `nbytes` calls should take in turn to read past the L2 cache."""
    return max(2, -(-ROTATED_NBYTES // nbytes))


def read_rate(device: torch.device) -> float:
    """GB/s of reading memory and writing none: the sum of 4 GiB of int64."""
    data = torch.ones(READ_NBYTES // 8, dtype=torch.int64, device=device)
    return READ_NBYTES / graph_us([lambda: torch.sum(data)]) / 1e3


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of cuBLAS on a square bfloat16 product of 8192, on random numbers (zeros run faster)."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / graph_us([lambda: torch.mm(a, b)]) / 1e6


def ceilings(device: torch.device) -> dict[str, float]:
    """What every share of a result refers to, measured in the same run."""
    measured = {"read_GB_per_s": round(read_rate(device), 1), "bf16_TFLOP_per_s": round(matrix_rate(device), 1)}
    torch.cuda.empty_cache()
    return measured


@contextmanager
def poisoned() -> Iterator[None]:
    """Tensors made without values inside are full of NaN: what a kernel leaves unwritten shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of operations that it cannot make deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; NaN where anything is NaN."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def hardware(device: torch.device) -> dict[str, Any]:
    """The GPU and its driver."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "gpu": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "driver": _driver(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] if found else None


def versions() -> dict[str, str | None]:
    """Of everything that the figures depend on; None for what is not installed."""
    names = ("triton", "transformers", "bitsandbytes")
    return {
        "minibble": minibble.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in names},
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_result(path: Path, result: dict[str, Any]) -> None:
    """`result` as JSON in `path`, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def result_path(folder: Path, name: str, gpu: str) -> Path:
    """A file of its own for each kind of GPU: NAME_h100.json, NAME_h200.json."""
    known = next((kind for kind in ("h100", "h200") if kind in gpu.lower()), None)
    return folder / f"{name}_{known or '_'.join(gpu.lower().split())}.json"
