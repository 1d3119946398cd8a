"""Has other tools read what minibble writes, by their own modules, and compares to the bit: `make interop`.

    python tools/interop.py [--environments .interop] [--tools bitsandbytes gptqmodel]

Quantizes the built-in model in every 4-bit format, decodes each matrix, and gives the files to bitsandbytes, auto-gptq
and gptqmodel, each in an environment of its own, installed with pip when first needed. What does not install on this
machine is listed with its reason. Ends with 1 if anything differs or no tool ran.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interop_environments import TOOLS, SkippedError, Tool, ensure
from safetensors.torch import save_file

from minibble.calibrate.job import quantize
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.tensors import QuantizedTensor

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "tools" / "interop_check.py"
CALIBRATED = {"calibration": "demo", "samples": 4, "seq_len": 128}
# What `quantize` is given, by the names under which the table has them.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "nf4-dq, calibrated": {"method": "nf4", **CALIBRATED},
    "nf4, nearest": {"method": "nf4", "double_quant": False},
    "int4-g128": {"method": "gptq", **CALIBRATED},
    "int4-g64, head too": {"method": "gptq", "group_size": 64, "quantize_head": True, **CALIBRATED},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECK_LIMIT_S = 600


@dataclass(frozen=True)
class Row:
    """One comparison: a tool's module, the checkpoint, dtype or file that was compared, how many, what differs."""

    tool: str
    by: str
    checkpoint: str
    what: str
    compared: int
    differ: dict[str, str]

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.tool, self.by, self.checkpoint, self.what, str(self.compared), self.verdict)

    @property
    def verdict(self) -> str:
        if not self.differ:
            return "equal" if self.compared else "NOTHING COMPARED"
        name, how = next(iter(self.differ.items()))
        return f"{len(self.differ)} DIFFER: {name}: {how}"


HEAD = ("tool", "read by", "checkpoint", "compared in", "number", "")


def make_checkpoints(tools: Sequence[Tool], scratch: Path) -> dict[str, Path]:
    """The checkpoints that any of `tools` reads: a folder for each label, `files` and their decoded matrices in it."""
    folders: dict[str, Path] = {}
    for label, settings in CHECKPOINTS.items():
        if any(settings["method"] in tool.methods for tool in tools):
            started = time.monotonic()
            folders[label] = scratch / str(len(folders))
            folders[label].mkdir()
            quantize("demo", folders[label] / "files", device="cpu", **settings)
            write_references(folders[label] / "files", folders[label])
            note(f"{label}: made in {time.monotonic() - started:.0f} s")
    return folders


def write_references(files: Path, folder: Path) -> None:
    """Every 4-bit matrix of the checkpoint `files` as minibble decodes it: a file in `folder` for each of DTYPES."""
    checkpoint = Checkpoint.open(files)
    assert checkpoint.format is not None
    for dtype in DTYPES:
        decoded = {}
        for name in sorted(checkpoint.quantized):
            q = checkpoint.read(checkpoint.specs[name])
            assert isinstance(q, QuantizedTensor)
            decoded[name] = checkpoint.format.decode(q, dtype)
        save_file(decoded, folder / f"{str(dtype).removeprefix('torch.')}.safetensors")


def check(tool: Tool, python: Path, folder: Path, label: str) -> tuple[list[Row], str]:
    """The rows of `tool` for one checkpoint, and versions in words; SkippedError if it does not import."""
    environ = {**os.environ, **tool.environ, "TMPDIR": str(folder)}
    command = [str(python), "-I", str(CHECK), tool.name, str(folder / "files"), str(folder)]
    try:
        done = subprocess.run(
            command, env=environ, cwd=folder, capture_output=True, text=True, errors="replace", timeout=CHECK_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return [Row(tool.title, "-", label, "-", 0, {"no answer": f"within {CHECK_LIMIT_S} s"})], ""
    if done.returncode:
        note(done.stderr)
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return [Row(tool.title, "-", label, "-", 0, {f"ended with {done.returncode}": last})], ""
    answer = json.loads(done.stdout.splitlines()[-1])
    if "skipped" in answer:
        raise SkippedError(answer["skipped"])
    versions = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    return [Row(tool.title, checkpoint=label, **read) for read in answer["reads"]], versions


def run_tool(tool: Tool, folders: dict[str, Path], environments: Path, torch_version: str, limit_s: float) -> list[Row]:
    """All rows of `tool`; SkippedError if it does not install or import."""
    started = time.monotonic()
    python = ensure(tool, environments, torch_version, limit_s)
    installed = time.monotonic()
    rows, versions = [], ""
    for label, folder in folders.items():
        if CHECKPOINTS[label]["method"] in tool.methods:
            found, versions = check(tool, python, folder, label)
            rows += found
    took = time.monotonic() - installed
    note(f"{tool.title}: environment {installed - started:.0f} s, comparison {took:.0f} s; {versions or 'failed'}")
    return rows


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows as lines of text, in columns."""
    lines = [HEAD, *(row.cells for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD) - 1)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)).rstrip()


def report(rows: Sequence[Row], skipped: dict[str, str]) -> int:
    """Print the table and what was skipped; the exit status."""
    if rows:
        print("\n".join(table(rows)))
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    wrong = [row for row in rows if row.verdict != "equal"]
    if not rows:
        print("no tool ran: nothing was compared")
    elif wrong:
        print(f"{len(wrong)} of {len(rows)} comparisons are not equal")
    else:
        print(f"all {len(rows)} comparisons are equal to the bit, by {', '.join({row.tool: None for row in rows})}")
    return 1 if wrong or not rows else 0


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=ROOT / ".interop", help="folder for the environments")
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], help="only these")
    # The project's own build: where that is one for CPUs, no gigabytes of CUDA libraries are installed.
    parser.add_argument("--torch", default=importlib.metadata.version("torch"), help="version  [default: %(default)s]")
    parser.add_argument("--limit", type=float, default=900, help="seconds for making an environment  [default: 900]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no installation is left running
    tools = [tool for tool in TOOLS if options.tools is None or tool.name in options.tools]
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="minibble-interop-") as scratch:
        folders = make_checkpoints(tools, Path(scratch))
        for tool in tools:
            try:
                rows += run_tool(tool, folders, options.environments.resolve(), options.torch, options.limit)
            except SkippedError as error:
                skipped[tool.title] = str(error)
    return report(rows, skipped)


if __name__ == "__main__":
    sys.exit(main())
