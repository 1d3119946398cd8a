"""The whole command at the real size: `python benchmarks/calibrate_real_size.py [--layers 2] [--method nf4]`.

A 16-bit checkpoint with the released model's shapes, random weights and a few layers goes through
`minibble quantize --calibration demo`, `verify --against` and `run`, files included. Gate: verify finds nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minibble.quantize.builtin import BUILTIN, demo_path
from minibble.quantize.config import ModelConfig
from minibble.quantize.dummy import write_dummy

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--method", default="nf4")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--name", default="calibrate_real_size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        started = time.perf_counter()
        nbytes = write_dummy(_config(options.layers), source, format=None)
        print(f"{nbytes / 1e9:.1f} GB written in {time.perf_counter() - started:.0f} s", flush=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_path() / name, source)
        done = _minibble(
            "quantize", source, out, "--method", options.method, "--calibration", "demo", "--device", "cuda"
        )
        checked = _minibble("verify", out, "--against", source)
        if not checked["ok"]:
            raise SystemExit(f"not measured: {checked['problems'][:3]}")
        shutil.rmtree(source)
        run = _minibble("run", out, "--prompt", "The", "--max-new-tokens", "8")
    result = {
        "what": f"{options.layers} layers, embedding and head of the released model, random weights, {options.method}",
        "gpu": torch.cuda.get_device_name(),
        "source_bytes": nbytes,
        **{key: done[key] for key in ("output_bytes", "elapsed_s", "mean_output_error", "fallbacks", "calibration")},
        "memory": done["memory"],
        "tensors_verified": checked["tensors"],
        "run_new_tokens": run["new_tokens"],
    }
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _config(layers: int) -> ModelConfig:
    kinds = [0] * (layers - 1) + [1]
    raw: dict[str, Any] = BUILTIN["minimax-text-01"] | {"num_hidden_layers": layers, "attn_type_list": kinds}
    return ModelConfig.from_dict(raw, where="minimax-text-01")


def _minibble(*arguments: Any) -> dict[str, Any]:
    """What a command prints with --json; its progress goes to our stderr."""
    command = [sys.executable, "-m", "minibble.cli.main", *map(str, arguments), "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    if ended.returncode:
        raise SystemExit(f"{' '.join(command[2:])} ended with {ended.returncode}")
    return json.loads(ended.stdout)


if __name__ == "__main__":
    main()
