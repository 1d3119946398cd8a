"""`minibble doctor`: what this machine can do, and what is missing."""

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from minibble.cli.options import json_option
from minibble.cli.output import emit_json, show
from minibble.quantize.sizes import binary, decimal

# What a package is needed for, and what to do where it is missing.
NEEDED = {
    "torch": "pip install torch",
    "transformers": "pip install transformers",
    "safetensors": "pip install safetensors",
}
USEFUL = {
    "triton": "fused GPU kernels need it; it comes with torch's CUDA builds",
    "cuda-bindings": "pip install 'minibble[cuda]': multiplies from 4-bit codes on GPUs; without it they are decoded",
    "bitsandbytes": "pip install 'minibble[cpu]': decodes NF4 on CPUs, and multiplies from the codes with AVX512-BF16",
    "numba": "pip install 'minibble[cpu]': multiplies from 4-bit codes on any CPU",
}
NF4_PATHS = {
    "fused": "bitsandbytes multiplies straight from the codes",
    "gemv": "our compiled loop multiplies straight from the codes",
    "decode": "bitsandbytes decodes, torch multiplies; numba would be faster",
    "torch": "torch decodes and multiplies; numba and bitsandbytes would be faster",
}
INT4_PATHS = {
    "kernel": "torch's kernel multiplies straight from the codes",
    "gemv": "our compiled loop multiplies straight from the codes",
    "torch": "torch decodes and multiplies; numba would be faster",
}
GPU_PATHS = {
    "hopper": "few and many tokens multiply straight from the codes",
    "fused": "few tokens multiply straight from the codes, many by slices decoded for cuBLAS",
    "decode": "matrices are decoded whole and multiplied by cuBLAS",
}
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass
class Findings:
    """All that was looked at, and the faults that keep minibble from working."""

    python: str
    packages: dict[str, str | None]
    cpu: dict[str, Any]
    memory_bytes: int
    disk_free_bytes: int
    gpus: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    can: list[str] = field(default_factory=list)
    cannot: list[str] = field(default_factory=list)


@click.command("doctor", short_help="Say what this machine can do and what is missing.")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can do and what is missing.

    Ends with 1 only if something is broken that minibble cannot work without.
    """
    findings = examine()
    if as_json:
        emit_json(findings_json(findings))
    else:
        show(_table(findings), *_verdict(findings))
    if findings.problems:
        ctx.exit(1)


def examine() -> Findings:
    """Look at packages, processor, memory, disk and GPUs."""
    packages = {name: _version(name) for name in (*NEEDED, *USEFUL)}
    findings = Findings(
        python=platform.python_version(),
        packages=packages,
        cpu=_cpu(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
    )
    findings.problems += [f"{name} is missing: {NEEDED[name]}" for name in NEEDED if packages[name] is None]
    if packages["torch"] is not None:
        _look_at_torch(findings)
    if not findings.problems:
        _judge(findings)
    return findings


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    """Name, cores and the instructions that matter, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    features = [feature for feature in CPU_FEATURES if feature in flags]
    name = facts.get("model name", platform.machine()).strip()
    return {"name": name, "cores": _cores(), "features": features, "nf4_path": None, "int4_path": None}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _look_at_torch(findings: Findings) -> None:
    try:
        import torch
    except Exception as error:
        findings.problems.append(f"torch cannot be imported ({error}): install it again")
        return
    from minibble.runtime.kernels.linear4 import cpu, cpu_int4

    findings.cpu |= {"nf4_path": cpu.path(), "int4_path": cpu_int4.path()}
    if torch.version.cuda is not None and not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        findings.problems.append(f"torch (CUDA {torch.version.cuda}) cannot use the GPU: the driver may be too old")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        findings.gpus.append(
            {
                "name": facts.name,
                "memory_bytes": total,
                "free_bytes": free,
                "compute_capability": f"{facts.major}.{facts.minor}",
                "path": _gpu_path(findings, facts.major),
            }
        )


def _gpu_path(findings: Findings, major: int) -> str:
    """How products with 4-bit matrices are done on a GPU of compute capability `major`: a key of GPU_PATHS."""
    if findings.packages["cuda-bindings"] is None or major < 8:
        return "decode"
    return "hopper" if major == 9 else "fused"


def _judge(findings: Findings) -> None:
    """What fits here and where it would run: from sizes alone, nothing is measured."""
    from minibble.quantize.builtin import builtin_config
    from minibble.runtime.footprint import footprint, kv_cache_bytes, state_bytes

    real = builtin_config("minimax-text-01")
    weights = footprint(real, "nf4-dq").total_bytes
    running = weights + state_bytes(real) + kv_cache_bytes(real, 8192)
    place = "on the GPU, about as fast as the source is read" if findings.gpus else "on the CPU"
    findings.can.append(f"quantize a model of any size {place}, one matrix in memory at a time")
    fits = findings.can if findings.disk_free_bytes >= weights else findings.cannot
    fits.append(f"store 4-bit MiniMax-Text-01 in the current folder: it takes {decimal(weights)}")
    gpu = sum(gpu["memory_bytes"] for gpu in findings.gpus)
    for size, name in ((gpu, "GPU memory"), (findings.memory_bytes, "main memory")):
        if size:
            fits = findings.can if size >= running else findings.cannot
            fits.append(f"hold it whole in {name}: {decimal(running)} with 8,192 tokens, {decimal(size)} are there")
    if any(gpu["path"] != "decode" for gpu in findings.gpus):
        _judge_running(findings)


def _judge_running(findings: Findings) -> None:
    """How 4-bit MiniMax-Text-01 would run on the GPUs, with experts in host memory where they do not fit."""
    from minibble.quantize.builtin import builtin_config
    from minibble.quantize.errors import BudgetError
    from minibble.runtime.devices import HOST_MARGIN_NBYTES
    from minibble.runtime.experts.host import available_nbytes
    from minibble.runtime.planning.device_bytes import ConfigSource
    from minibble.runtime.planning.machine import Gpu, Machine
    from minibble.runtime.planning.planner import plan_placement

    gpus = tuple(
        Gpu(f"cuda:{index}", gpu["free_bytes"], Gpu.of_size(index, gpu["memory_bytes"]).read_bytes_per_s)
        for index, gpu in enumerate(findings.gpus)
    )
    machine = Machine(gpus, host_bytes=max(0, available_nbytes() - HOST_MARGIN_NBYTES))
    source = ConfigSource.of(builtin_config("minimax-text-01"), "nf4-dq")
    try:
        placement = plan_placement(source, machine, context=8192)
    except BudgetError as error:
        findings.cannot.append(f"run it on the GPUs as they are now: {error}")
        return
    waiting = sum(map(len, placement.pinned)) * placement.record_bytes
    elsewhere = f"{decimal(waiting)} of experts in host memory, " if waiting else ""
    findings.can.append(
        f"run it on {len(placement.devices)} of {len(gpus)} GPUs as they are now: {elsewhere}"
        f"{placement.expected_decode_tokens_per_s:.3g} tokens/s expected (minibble report says more)"
    )


def findings_json(findings: Findings) -> dict[str, Any]:
    """The findings as plain data."""
    return {"ok": not findings.problems, **vars(findings)}


def _table(findings: Findings) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("Python", findings.python)
    for name, found in findings.packages.items():
        remedy = NEEDED.get(name) or USEFUL[name]
        missing = f"[{'red' if name in NEEDED else 'yellow'}]missing[/]  [dim]{escape(remedy)}[/]"
        table.add_row(name, escape(found) if found else missing)
    cpu = findings.cpu
    table.add_row("CPU", f"{escape(cpu['name'])}, {cpu['cores']} cores, {' '.join(cpu['features']) or 'no AVX'}")
    if cpu["nf4_path"] is not None:
        table.add_row("", f"[dim]NF4 products: {NF4_PATHS[cpu['nf4_path']]}[/]")
        table.add_row("", f"[dim]int4 products: {INT4_PATHS[cpu['int4_path']]}[/]")
    table.add_row("memory", f"{decimal(findings.memory_bytes)} ({binary(findings.memory_bytes)})")
    table.add_row("free disk", f"{decimal(findings.disk_free_bytes)} in the current folder")
    for index, gpu in enumerate(findings.gpus):
        size = f"{decimal(gpu['memory_bytes'])}, {decimal(gpu['free_bytes'])} free"
        table.add_row(f"GPU {index}", f"{escape(gpu['name'])}, {size}, compute {gpu['compute_capability']}")
        table.add_row("", f"[dim]4-bit products: {GPU_PATHS[gpu['path']]}[/]")
    if not findings.gpus:
        table.add_row("GPU", "[dim]none that torch can use: everything runs on the CPU[/]")
    return table


def _verdict(findings: Findings) -> list[str]:
    from rich.markup import escape

    return [
        "",
        *(f"[green]✓[/] can {escape(text)}" for text in findings.can),
        *(f"[yellow]·[/] cannot {escape(text)}" for text in findings.cannot),
        *(f"[red]✗[/] {escape(problem)}" for problem in findings.problems),
    ]
