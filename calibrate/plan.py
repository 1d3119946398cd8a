"""Where calibration keeps its activations and how many experts it solves at once, decided before anything is read.

Pure arithmetic: the largest things alive at once in each phase of a layer, from the config alone.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import BudgetError
from minibble.quantize.sizes import binary, decimal
from minibble.runtime.kernels.feedback import BLOCK
from minibble.runtime.plan import CUBLAS_NBYTES

Place = Literal["gpu", "host", "disk"]

CHUNK_TOKENS = 8192  # tokens that go through a layer at once: 3.5 GB of workspace at the real size
STORES = ("mixed", "sums", "hidden")  # in the order in which they leave a GPU that is too small
EXPERTS_AT_ONCE = 8
# Experts at once, and how many stores are in host memory, the quickest first: on an H200 4 experts at once instead of 8
# cost 1.6 s a layer, sums in host memory 14 s.
WAYS = [(EXPERTS_AT_ONCE, 0), (4, 0), (4, 1), (2, 1), (1, 1), (2, 2), (2, 3), (1, 3)]
# What the allocator cannot use: with 8 experts on an H200 it took 17 % more than was alive at the peak, 4 % with the
# segments that the command line asks for.
FRAGMENTATION = 1.05
_SPARE = 0.9  # of what is free now is taken at most: other programs live too


@dataclass(frozen=True)
class Budget:
    """Free bytes: on the GPU (0 without one), in host memory, and on the disk of the output."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class CalibrationPlan:
    """Places of the three stores of activations [tokens, features], and predicted peaks in bytes.

    hidden: what goes from layer to layer; mixed: what attention gives to its output projection; sums: what the
    experts have given so far, float32.
    """

    tokens: int
    chunk_sequences: int
    experts_at_once: int
    hidden: Place
    mixed: Place
    sums: Place
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def describe(self) -> str:
        """One line for people."""
        places = {"hidden": self.hidden, "attention": self.mixed, "expert sums": self.sums}
        where = ", ".join(f"{name} on the GPU" if place == "gpu" else f"{name} in host memory" if place == "host"
                          else f"{name} on disk" for name, place in places.items())  # fmt: skip
        gpu = f"; at most {decimal(self.gpu_bytes)} ({binary(self.gpu_bytes)}) of GPU memory" if self.gpu_bytes else ""
        return (
            f"{self.tokens:,} tokens; {where}; {self.experts_at_once} experts at once{gpu}, "
            f"{decimal(self.host_bytes)} of host memory"
            + (f", {decimal(self.disk_bytes)} of disk" if self.disk_bytes else "")
        )


def free_budget(device: torch.device, folder: Path, output_bytes: int, gpu_memory: int | None) -> Budget:
    """What is free now, beside the output in `folder`; `gpu_memory` in bytes bounds the GPU's share."""
    gpu = 0
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        gpu = int(_SPARE * free) if gpu_memory is None else gpu_memory
        if gpu > free:
            raise BudgetError(f"{device} has {decimal(free)} free, fewer than the {decimal(gpu)} allowed: allow fewer")
    while not folder.exists():
        folder = folder.parent
    disk = max(0, int(_SPARE * shutil.disk_usage(folder).free) - output_bytes)
    return Budget(gpu, int(_SPARE * _available_bytes()), disk)


def _available_bytes() -> int:
    """Host memory that can be had without swapping."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def plan_calibration(
    config: ModelConfig, samples: int, seq_len: int, device: torch.device, budget: Budget
) -> CalibrationPlan:
    """The first of WAYS that fits; BudgetError names what even the most frugal one lacks.

    Stores that find no room in host memory go to disk.
    """
    ways = WAYS if device.type == "cuda" else [(experts, len(STORES)) for experts in (EXPERTS_AT_ONCE, 4, 2, 1)]
    plans = [_plan(config, samples, seq_len, device, budget, *way) for way in ways]
    for plan in plans:
        fits_gpu = plan.gpu_bytes <= budget.gpu_bytes
        if fits_gpu and plan.host_bytes <= budget.host_bytes and plan.disk_bytes <= budget.disk_bytes:
            return plan
    least = plans[-1]
    for what, needed, free, remedy in (
        (str(device), least.gpu_bytes, budget.gpu_bytes, "allow more, take another device, or a smaller --seq-len"),
        ("host memory", least.host_bytes, budget.host_bytes, "take fewer --samples, or a smaller --seq-len"),
        ("the disk", least.disk_bytes, budget.disk_bytes, "make room, or take fewer --samples"),
    ):
        if needed > free:
            raise BudgetError(
                f"calibrating with {samples} x {seq_len} tokens needs {decimal(needed)} of {what}, "
                f"{decimal(needed - free)} more than there is: {remedy}"
            )
    raise AssertionError("a plan that fits nowhere lacks something")


def _plan(
    config: ModelConfig, samples: int, seq_len: int, device: torch.device, budget: Budget, experts: int, moved: int
) -> CalibrationPlan:
    gpu, itemsize = device.type == "cuda", 2 if device.type == "cuda" else 4
    tokens, experts = samples * seq_len, min(experts, config.num_experts)
    chunk = min(samples, max(1, CHUNK_TOKENS // seq_len))
    HK, D, F = config.num_attention_heads * config.head_dim, config.hidden_size, config.intermediate_size
    stores = {"mixed": tokens * HK * itemsize, "sums": tokens * D * 4, "hidden": tokens * D * itemsize}
    work = _work_nbytes(config, chunk * seq_len, experts, itemsize)
    source = 2 * max(experts * 3 * F * D, 5 * HK * D) * 2  # a group in work, the next one being read
    places: dict[str, Place] = {name: "host" if number < moved else "gpu" for number, name in enumerate(STORES)}
    host = source + (0 if gpu else work)
    for name in STORES:
        if places[name] == "host":
            if host + stores[name] > budget.host_bytes:
                places[name] = "disk"
            else:
                host += stores[name]
    on_gpu = sum(stores[name] for name in STORES if places[name] == "gpu")
    return CalibrationPlan(
        tokens, chunk, experts, places["hidden"], places["mixed"], places["sums"],
        gpu_bytes=int(FRAGMENTATION * (work + on_gpu)) + CUBLAS_NBYTES if gpu else 0,
        host_bytes=host,
        disk_bytes=sum(stores[name] for name in STORES if places[name] == "disk"),
    )  # fmt: skip


def _work_nbytes(config: ModelConfig, chunk: int, experts: int, itemsize: int) -> int:
    """The most that is alive at once beside the stores, `chunk` tokens being in work."""
    HK, D, F = config.num_attention_heads * config.head_dim, config.hidden_size, config.intermediate_size
    attention = chunk * (4 * HK * itemsize + 11 * HK * 4 + 3 * D * itemsize) + 4 * HK * D * (itemsize + 1)
    expert = chunk * (2 * D + 6 * F) * itemsize + 2 * F * D * itemsize + experts * 3 * F * D
    solving = max(
        _solve_nbytes(1, 4 * HK, D),
        _solve_nbytes(1, D, HK),
        _solve_nbytes(experts, 2 * F, D),
        _solve_nbytes(experts, D, F) + experts * 2 * F * D,
    )
    return max(attention, expert, solving)


def _solve_nbytes(B: int, N: int, K: int) -> int:
    """Of `solver.solve`: the weights twice (a second time in order), two copies of codes, H and U, a block's work, and
    five squares while one Hessian is factored."""
    blocks = 6 * B * BLOCK * N * 4
    return B * (K * N * (4 + 4 + 1 + 1) + 2 * 4 * K * K) + blocks + 5 * 4 * K * K
