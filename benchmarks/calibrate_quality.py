"""What calibration is worth: `python benchmarks/calibrate_quality.py SOURCE --calibration FILE --text FILE`.

SOURCE is quantized to nearest NF4, to calibrated NF4 and to calibrated int4 in groups of 128; all are scored against
SOURCE on the same windows of a text that calibration has not seen. Gate: each output passes `minibble verify`.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minibble.calibrate.job import quantize
from minibble.quantize.builtin import resolve_source
from minibble.quantize.verify import verify_checkpoint
from minibble.runtime.evaluate import evaluate

RESULTS = Path(__file__).parent / "results"
WAYS: dict[str, dict[str, Any]] = {
    "NF4, nearest": {"method": "nf4"},
    "NF4, error feedback alone": {"method": "nf4", "sweeps": 0},
    "NF4, calibrated": {"method": "nf4"},
    "int4 g128, calibrated": {"method": "gptq"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="calibrate_quality")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in WAYS.items():
            rows[name] = measure(options, Path(folder) / "out" / name.replace(" ", "-"), name, settings)
            rows[name]["share"] = rows[name]["kl"] / rows["NF4, nearest"]["kl"]
            print(name, json.dumps(rows[name]), flush=True)
    result = {
        "source": resolve_source(options.source).name,
        "calibration": f"{options.samples} x {options.seq_len} tokens",
        "device": options.device,
        "ways": rows,
        "versions": {name: version(name) for name in ("minibble", "torch")},
    }
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace, out: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize, verify and score one way."""
    if name != "NF4, nearest":
        chosen = {"calibration": options.calibration, "samples": options.samples, "seq_len": options.seq_len}
        settings = settings | chosen
    started = time.perf_counter()
    done = quantize(options.source, out, device=options.device, **settings)
    elapsed_s = time.perf_counter() - started
    outcome = verify_checkpoint(out, against=options.source)
    if not outcome.ok:
        raise SystemExit(f"not measured: {outcome.problems[0]}")
    score = evaluate(out, options.text, options.source, device=options.device, max_windows=options.windows)
    output_error = done.totals.get("mean_output_error")
    return asdict(score) | {"quantize_s": round(elapsed_s, 1), "mean_output_error": output_error}


if __name__ == "__main__":
    main()
