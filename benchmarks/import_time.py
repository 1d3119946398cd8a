"""What `import minibble` costs: a fresh interpreter with it, minus a fresh interpreter without.

python benchmarks/import_time.py [--repeats 10]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

RESULT = Path(__file__).parent / "results" / "import_time.json"
BOUND_S = 0.3
HEAVY = ("torch", "transformers", "bitsandbytes", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result = measure(options.repeats)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(result["import_s"] >= BOUND_S)


def measure(repeats: int) -> dict[str, Any]:
    """Medians over interleaved repeats; the first round, which may compile and fill caches, does not count."""
    loaded = f"import sys, minibble; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    if heavy:
        sys.exit(f"not measured: `import minibble` imports {', '.join(heavy)}")
    times: dict[str, list[float]] = {"pass": [], "import minibble": []}
    for repeat in range(repeats + 1):
        for code, seconds in times.items():
            start = perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if repeat:
                seconds.append(perf_counter() - start)
    nothing, with_import = median(times["pass"]), median(times["import minibble"])
    return {
        "what": 'python -c "import minibble" minus python -c pass, medians',
        "import_s": round(with_import - nothing, 4),
        "bound_s": BOUND_S,
        "python_c_pass_s": round(nothing, 4),
        "repeats": repeats,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }


if __name__ == "__main__":
    main()
