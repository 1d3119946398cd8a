"""The kernels against their ceilings and their peers: `python benchmarks/kernels.py [--quick]`.

Every kernel is first compared with a float64 product, lightning attention with its recurrence. Peers that are not
installed are named as missing. Takes about 10 GB of GPU memory.
"""

import argparse
import sys
from pathlib import Path

from minibble.runtime.bench import gpu
from minibble.runtime.bench.kernels import measure
from minibble.runtime.bench.tables import lines

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true", help="few numbers of tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    result = measure(
        gpu.the_gpu(options.device), quick=options.quick,
        progress=lambda done, total, current: print(f"{done}/{total} {current}", file=sys.stderr),
    )  # fmt: skip
    gpu.write_result(gpu.result_path(options.out, "kernels", result["hardware"]["gpu"]), result)
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
