"""The tools that read minibble's files, and an environment of its own for each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_READY = "ready.json"  # in an environment that was installed to the end: what is in it
_REASON_LENGTH = 200  # characters


class SkippedError(Exception):
    """A tool that cannot run on this machine, and why."""


@dataclass(frozen=True)
class Tool:
    """A tool by its name in the package index, what must lie beside it, and how it is installed."""

    name: str
    version: str
    methods: tuple[str, ...]  # of `minibble quantize`: what it reads
    beside: tuple[str, ...]
    pip_options: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"


TOOLS = (
    Tool("bitsandbytes", "0.50.2", ("nf4",), ("transformers==5.23.0",)),
    # The last release, of 2024: nothing newer beside it imports. Where no wheel fits, it builds without CUDA, and needs
    # torch to do so.
    Tool(
        "auto-gptq",
        "0.7.1",
        ("gptq",),
        ("transformers==4.46.3", "peft==0.13.2", "accelerate==1.1.1"),
        ("--no-build-isolation",),
        {"BUILD_CUDA_EXT": "0"},
    ),
    # The last release that does not ask for a newer torch than the project's. It has its decoding compiled, for each
    # module anew; the same operations run without.
    Tool(
        "gptqmodel",
        "7.6.0",
        ("gptq",),
        ("transformers==5.23.0",),
        (),
        {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"},
    ),
)


def ensure(tool: Tool, folder: Path, torch: str, limit_s: float) -> Path:
    """The Python of the environment of `tool` under `folder`, made unless it is there.

    `torch` is a version, `limit_s` the seconds that making it may take. SkippedError says why it could not be made; all
    that was printed is in a .log file beside it.
    """
    home = folder / tool.name
    python, ready = home / "bin" / "python", home / _READY
    wanted = json.dumps({"torch": torch, "python": sys.version, **asdict(tool)})
    if ready.is_file() and ready.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    commands = [
        [sys.executable, "-m", "venv", str(home)],
        # First torch alone, for tools that want it to be there when they are built.
        [*pip, f"torch=={torch}", "numpy", "safetensors", "setuptools", "wheel"],
        [*pip, *tool.pip_options, f"torch=={torch}", f"{tool.name}=={tool.version}", *tool.beside],
    ]
    deadline = time.monotonic() + limit_s
    with (folder / f"{tool.name}.log").open("w+", encoding="utf-8") as log:
        for command in commands:
            if not _run(command, deadline - time.monotonic(), tool.environ, log):
                log.seek(0)
                raise SkippedError(reason(log.read().splitlines(), limit_s, time.monotonic() >= deadline))
    ready.write_text(wanted, "utf-8")
    return python


def reason(lines: Sequence[str], limit_s: float, late: bool) -> str:
    """Why an installation failed, in a line: the first error that pip printed, or else its last words."""
    if late:
        return f"not installed within {limit_s:.0f} s"
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith(("ERROR:", "error:"))]
    text = next(iter(errors or said[-1:]), "nothing said")
    return "does not install: " + text.removeprefix("ERROR:").strip()[:_REASON_LENGTH]


def _run(command: list[str], limit_s: float, environ: Mapping[str, str], log) -> bool:
    """Whether `command` ended well within `limit_s`; if it is late, it is ended with all that it started."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environ}, start_new_session=True
    )
    try:
        return process.wait(max(limit_s, 0.1)) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
