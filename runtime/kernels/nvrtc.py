"""CUDA C++ on the user's GPU without a toolkit: compiled by NVRTC on first use, kept on disk, launched by the driver.

Both libraries come with torch's CUDA builds and are reached through `cuda-bindings`. Compiled code lies in
`$MINIBBLE_CACHE`, else `$XDG_CACHE_HOME/minibble`, else `~/.cache/minibble`, under a name made of everything that it
depends on. `MINIBBLE_CUDA_ARCH=compute_80` compiles for another architecture than the GPU's own.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minibble.quantize.errors import MinibbleError

log = logging.getLogger(__name__)

NUMBERS = Path(__file__).with_name("numbers.cuh")  # the first source of every kernel

Argument = torch.Tensor | int | float | ctypes.Structure | ctypes.c_longlong


class KernelError(MinibbleError):
    """A kernel could not be compiled or launched."""


@cache
def available() -> bool:
    """True where cuda-bindings is installed."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


@cache
def architecture(device: int) -> str:
    """What kernels for the CUDA device number `device` are compiled for: sm_90a on Hopper, sm_80 on an A100."""
    asked = os.environ.get("MINIBBLE_CUDA_ARCH")
    if asked:
        return asked
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def is_hopper(device: torch.device) -> bool:
    """True where kernels may use what Hopper alone has: the copy engine for tiles, wgmma."""
    return architecture(device.index or 0) == "sm_90a"


class Kernel:
    """One `__global__` function of CUDA C++ files, compiled for each device when first launched there.

    `sources` are joined in order, after `NUMBERS`; `macros` become -D options. Arguments are tensors (their addresses),
    int (32 bit), float (32 bit), and ctypes values (64-bit numbers) and structures, which are passed as they are.
    """

    def __init__(self, name: str, sources: Sequence[Path], macros: dict[str, int | str] | None = None):
        self.name, self.sources = name, (NUMBERS, *sources)
        self.macros = tuple(f"-D{key}={value}" for key, value in (macros or {}).items())
        self._functions: dict[int, Any] = {}
        self._shared: dict[int, int] = {}

    def launch(
        self,
        grid: int | tuple[int, int, int],
        threads: int,
        arguments: Sequence[Argument],
        shared_nbytes: int = 0,
        overlap: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on torch's current stream of the current device.

        With `overlap` the kernel may begin before the one ahead of it has ended, and must itself wait for it
        (griddepcontrol.wait) before it touches what that one writes.
        """
        from cuda.bindings import driver

        device = torch.cuda.current_device()
        function = self.function(device, shared_nbytes)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (grid, 1, 1) if isinstance(grid, int) else grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_nbytes
        config.hStream = torch.cuda.current_stream(device).cuda_stream
        attributes = []
        if overlap and _can_overlap(device):
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            shape = attribute.value.clusterDim
            shape.x, shape.y, shape.z = cluster, 1, 1
            attribute.value.clusterDim = shape
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*[ctypes.addressof(value) for value in values])
        check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0), f"launch of {self.name}")

    def function(self, device: int, shared_nbytes: int = 0) -> Any:
        """The driver's handle of the function on CUDA device `device`, allowed `shared_nbytes` of shared memory."""
        from cuda.bindings import driver

        if device not in self._functions:
            module = _module(self.sources, self.macros, device)
            self._functions[device] = check(
                driver.cuModuleGetFunction(module, self.name.encode()), f"look-up of {self.name}"
            )
        if shared_nbytes > self._shared.get(device, 0):
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(
                driver.cuFuncSetAttribute(self._functions[device], attribute, shared_nbytes),
                f"{self.name} with {shared_nbytes} bytes of shared memory",
            )
            self._shared[device] = shared_nbytes
        return self._functions[device]


def _can_overlap(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9 and architecture(device) == "sm_90a"


def _value(argument: Argument) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure | ctypes.c_longlong):
        return argument
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    assert -(2**31) <= argument < 2**31, f"{argument} needs 64 bits: pass a ctypes.c_longlong"
    return ctypes.c_int(argument)


@cache
def _module(sources: tuple[Path, ...], macros: tuple[str, ...], device: int) -> Any:
    """The loaded module of the joined `sources` on CUDA device `device`."""
    from cuda.bindings import driver, nvrtc

    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # makes torch's context the current one
        text = "\n".join(path.read_text() for path in sources)
        arch = architecture(device)
        version = check(nvrtc.nvrtcVersion(), "NVRTC")
        key = hashlib.sha256(repr((text, macros, arch, version)).encode()).hexdigest()[:32]
        path = _cache_folder() / f"{sources[-1].stem}-{arch}-{key}"
        code = path.read_bytes() if path.is_file() else b""
        if not code:
            started = time.perf_counter()
            code = _compile(text, sources[-1].name, macros, arch)
            kept = _keep(path, code)
            elapsed_s = time.perf_counter() - started
            log.info("compiled %s for %s in %.1f s%s", sources[-1].name, arch, elapsed_s, kept)
        return check(driver.cuModuleLoadData(code), f"load of {sources[-1].name}")


def _compile(text: str, name: str, macros: Sequence[str], arch: str) -> bytes:
    """Machine code (for sm_XX) or PTX (for compute_XX)."""
    from cuda.bindings import nvrtc

    program = check(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []), name)
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--device-as-default-execution-space", *macros]
    status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status):
        buffer = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), name)
        check(nvrtc.nvrtcGetProgramLog(program, buffer), name)
        raise KernelError(f"{name} cannot be compiled for {arch}:\n{buffer.decode(errors='replace').strip()}")
    size, get = (
        (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        if arch.startswith("sm_")
        else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    )
    code = b" " * check(size(program), name)
    check(get(program, code), name)
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _cache_folder() -> Path:
    asked, shared = os.environ.get("MINIBBLE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if asked:
        return Path(asked)
    return (Path(shared) if shared else Path.home() / ".cache") / "minibble"


def _keep(path: Path, code: bytes) -> str:
    """Write `code` to `path`, whole or not at all; says where, or why not: there may be no place for a cache."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(code)
        part.replace(path)
    except OSError as error:
        return f"; not kept ({error})"
    return f"; kept in {path.parent}"


def check(result: tuple[Any, ...], what: str) -> Any:
    """What a function of cuda-bindings returns beside its status; KernelError if it failed."""
    status, *values = result
    if int(status):
        raise KernelError(f"{what}: {status.name if hasattr(status, 'name') else status}")
    return values[0] if values else None
