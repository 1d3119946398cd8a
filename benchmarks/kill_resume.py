"""Kills `quantize` with SIGKILL at random moments and resumes it: every output must end byte-identical.

    python benchmarks/kill_resume.py [SOURCE] [--kills 20] [--method gptq] [--calibration TEXT --samples N --seq-len T]

Each trial starts an output, kills it once at a random moment before it is whole, resumes it and compares every file
with those of an uninterrupted run. SOURCE is a 16-bit checkpoint (default: the built-in `demo`).
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minibble.quantize.builtin import resolve_source
from minibble.quantize.folder import INDEX

RESULT = Path(__file__).parent / "results" / "kill_resume.json"

CHILD = """
import sys
import json
from minibble.calibrate.job import quantize
print("ready", flush=True)
quantize(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]), resume=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="demo")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shard-size", default="1MB")
    parser.add_argument("--method", default="nf4")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    source, rng = resolve_source(options.source), random.Random(options.seed)
    names = ("method", "calibration", "samples", "seq_len", "shard_size")
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        elapsed = run(source, whole, settings)
        expected = digests(whole)
        trials: list[dict[str, Any]] = []
        while len(trials) < options.kills:
            out = Path(folder) / "killed"
            killed = run(source, out, settings, kill_after=rng.uniform(0, elapsed))
            if (out / INDEX).exists():  # it was quicker than the kill: no trial
                shutil.rmtree(out)
                continue
            kept = len(list(out.glob("*.safetensors"))) if out.exists() else 0
            run(source, out, settings)
            same = digests(out) == expected
            trials.append({"killed_after_s": round(killed, 3), "shards_kept": kept, "identical": same})
            print(trials[-1], flush=True)
            shutil.rmtree(out)
    shards = sum(name.endswith(".safetensors") for name in expected)
    identical = sum(trial["identical"] for trial in trials)
    result = {
        "settings": settings,
        "uninterrupted_s": round(elapsed, 3),
        "shards": shards,
        "identical": identical,
        "trials": trials,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{identical} of {len(trials)} byte-identical after kill and resume")
    sys.exit(identical != len(trials))


def run(source: Path, out: Path, settings: dict[str, Any], kill_after: float | None = None) -> float:
    """Quantize in a process of its own, killed `kill_after` seconds into its work; returns how long it worked."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        started = time.monotonic()
        try:
            code = child.wait(kill_after)
        except subprocess.TimeoutExpired:
            child.kill()
            code = 0
        if code:
            raise SystemExit(f"quantize failed with exit code {code}")
        return time.monotonic() - started


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
