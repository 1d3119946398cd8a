"""CUDA kernels compiled for the CPU with a stand-in for CUDA, `kernels/emulated/cuda.h`: one fiber a thread."""

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.runtime.kernels.nvrtc import Kernel

HERE = Path(__file__).resolve().parents[1] / "kernels" / "emulated"
SEEDS = itertools.count()
_libraries: dict[tuple[str, ...], ctypes.CDLL] = {}


def available() -> bool:
    """True where there is a C++ compiler."""
    return shutil.which("c++") is not None


def library(
    sources: Sequence[Path],
    macros: Sequence[str],
    folder: Path,
    *,
    replaced: Sequence[str],
    shared: str | None = None,
    headers: Sequence[str] = ("cuda.h",),
    entry: str,
) -> ctypes.CDLL:
    """The kernel of `sources`, without those `replaced` by `headers`, with the function `launch` of `entry`.

    `shared` is how the sources declare shared memory, if they have any. Compiled once for each entry and set of macros.
    """
    key = entry, *macros
    if key not in _libraries:
        kernel = "\n".join(path.read_text() for path in sources if path.name not in replaced)
        if shared is not None:
            assert shared in kernel
            kernel = kernel.replace(shared, f"#define shared (({shared.split()[-2]}*)shared_memory())")
        source = folder / f"{Path(entry).stem}{len(_libraries)}.cpp"
        parts = [*((HERE / name).read_text() for name in headers), kernel, (HERE / entry).read_text()]
        source.write_text("\n".join(parts))
        built = source.with_suffix(".so")
        flags = ["-std=c++17", "-O1", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-shared", "-fPIC"]
        subprocess.run(["c++", *flags, *macros, "-o", built, source], check=True)
        _libraries[key] = ctypes.CDLL(str(built))
    return _libraries[key]


class FewTokens:
    """A kernel for few tokens as `Kernel`, but for the CPU; `architecture` is what __CUDA_ARCH__ says."""

    def __init__(self, kernel: Kernel, architecture: int, folder: Path):
        self.kernel, self.folder = kernel, folder
        self.macros = (*kernel.macros, f"-D__CUDA_ARCH__={architecture}")

    def launch(
        self, grid: int, threads: int, arguments: list[Any], shared_nbytes: int, overlap: bool = False
    ) -> None:  # fmt: skip
        built = library(
            self.kernel.sources[1:], self.macros, self.folder, replaced=("few_ptx.cuh",),
            shared="extern __shared__ __align__(1024) char shared[];", headers=("cuda.h", "few.h"),
            entry=f"{self.kernel.name}.cpp",
        )  # fmt: skip
        built.launch(grid, next(SEEDS), ctypes.byref(arguments[0]))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, which shows where a kernel wrote nothing."""
    return torch.full(shape, float("nan"), dtype=dtype)
