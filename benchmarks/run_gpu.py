"""Run a model of the real sizes on one GPU: peak memory against the plan, and how fast it goes.

    python benchmarks/run_gpu.py [--layers 2] [--folder DIR] [--prompt-tokens 512] [--new-tokens 32]

Writes a checkpoint of random NF4 codes with the released model's shapes and the given number of layers to DIR
(about 5.3 GB a layer), then runs it through `minibble run --json`. First the logits of the CUDA path must equal
those of the reference kernels in float32.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from minibble.quantize.builtin import BUILTIN, demo_path
from minibble.quantize.config import ModelConfig
from minibble.quantize.dummy import write_dummy
from minibble.runtime.loading import load

RESULT = Path(__file__).parent / "results" / "run_gpu.json"
LOGITS_BOUND = 1e-4  # largest difference over the largest logit, float32 on both sides
PEAK_BOUND = 0.03  # predicted against measured peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "dummy"
        started = time.perf_counter()
        nbytes = write_dummy(_config(options.layers), path)
        wrote_s = time.perf_counter() - started
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_path() / name, path)
        error = logits_error(path)
        assert error < LOGITS_BOUND, f"logits differ by {error:.1e}, at most {LOGITS_BOUND} allowed: nothing measured"
        run = _run(path, options.prompt_tokens, options.new_tokens)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "layers": options.layers,
        "checkpoint_bytes": nbytes,
        "write_gb_per_s": nbytes / wrote_s / 1e9,
        "logits_error": error,
        **_figures(run),
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    assert abs(result["predicted_over_measured"] - 1) < PEAK_BOUND, "the plan missed the peak by more than 3 %"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def _config(layers: int) -> ModelConfig:
    raw = dict(BUILTIN["minimax-text-01"])
    raw |= {"num_hidden_layers": layers, "attn_type_list": [0] * (layers - 1) + [1]}
    return ModelConfig.from_dict(raw)


def logits_error(path: Path, tokens: int = 48) -> float:
    """Largest difference of float32 logits, CUDA path against reference kernels, over the largest logit."""
    ids = torch.randint(0, 2000, (1, tokens), generator=torch.Generator().manual_seed(0))
    logits = []
    for kernels in ("reference", ""):
        os.environ["MINIBBLE_KERNELS"] = kernels
        model = load(path, device="cuda", dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(ids.to("cuda")).logits.cpu())
        del model
        torch.cuda.empty_cache()
    reference, ours = logits
    return float((ours - reference).abs().max() / reference.abs().max())


def _run(path: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """What `minibble run --json` says, in a process of its own."""
    prompt = "the " * prompt_tokens
    command = [sys.executable, "-m", "minibble.cli.main", "run", str(path), "--prompt", prompt, "--json",
               "--device", "cuda", "--max-new-tokens", str(new_tokens)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    measured, predicted = run["peak_gpu_bytes"][0], run["plan"]["total_bytes"]
    keys = ("prompt_tokens", "new_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "plan")
    return {
        "peak_gpu_bytes": measured,
        "predicted_bytes": predicted,
        "predicted_over_measured": predicted / measured,
        **{key: run[key] for key in keys},
    }


if __name__ == "__main__":
    main()
