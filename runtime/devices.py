"""The devices that are there: which ones are meant, what they compute in, and what they offer to a plan."""

import ctypes
import gc
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minibble.quantize.errors import ConfigError
from minibble.runtime.experts.host import available_nbytes
from minibble.runtime.planning.machine import Gpu, Machine

HOST_MARGIN_NBYTES = 4 << 30  # of host memory, left for the program itself and what it reads
DISK_MARGIN_NBYTES = 1 << 30


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there is hardware for its products, float32 elsewhere, which is then the faster one."""
    if device.type == "cuda":
        return torch.bfloat16
    from minibble.runtime.kernels.linear4 import cpu

    return torch.bfloat16 if cpu.has_fused() else torch.float32


def the_devices(device: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    """The devices meant by `device`, each once; ConfigError if one is not there."""
    if device is None:
        return [torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")]
    if isinstance(device, str):
        device = [part.strip() for part in device.split(",")]
    named = [device] if isinstance(device, torch.device) else list(device)
    devices = list(dict.fromkeys(_device(name) for name in named))
    if not devices or (len(devices) > 1 and any(chosen.type != "cuda" for chosen in devices)):
        raise ConfigError(f"devices {', '.join(map(str, named))}: use one device, or several GPUs")
    return devices


def _device(name: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' is unknown: use cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported: use cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def this_machine(
    devices: Sequence[torch.device], host_memory: int | None = None, folder: Path | None = None
) -> Machine:
    """What the GPUs `devices` have free, host memory up to `host_memory` bytes, and the disk of `folder`."""
    gpus = []
    gc.collect()  # what torch, and the C library, keep of models that are gone counts as free
    torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        gpus.append(Gpu(str(device), free, Gpu.of_size(0, total).read_bytes_per_s))
    host = max(0, available_nbytes() - HOST_MARGIN_NBYTES)
    disk = None if folder is None else max(0, shutil.disk_usage(folder).free - DISK_MARGIN_NBYTES)
    return Machine(tuple(gpus), host if host_memory is None else min(host, host_memory), disk)


def gpu_bytes(device: torch.device) -> dict[str, Any]:
    """Of a GPU: bytes in use as the driver counts them, and the most that torch's allocator took and gave out."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": str(device),
        "driver_bytes": total - free,
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
    }


def cap(device: torch.device, more: int | None) -> None:
    """Let torch's allocator take at most `more` bytes of a GPU than it holds, for all of this process; None for all.

    At the bound it first gives back what it keeps for later, then fails with torch.OutOfMemoryError. The last call
    counts: a model loaded without a bound lifts that of the one before.
    """
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        share = 1.0 if more is None else min(1.0, (torch.cuda.memory_reserved(device) + more) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
