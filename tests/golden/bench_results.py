"""Results as the GPU benchmarks write them, with made-up figures and without bitsandbytes."""

from typing import Any

HARDWARE = {"gpu": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_000_000_000, "driver": "1.2.3"}
CEILINGS = {"read_GB_per_s": 3090.0, "bf16_TFLOP_per_s": 781.0}


def kernels() -> dict[str, Any]:
    """Of `runtime.bench.kernels.measure`."""

    def found(us: float, share: float) -> dict[str, float]:
        return {"us": us, "GB_per_s": share * 3090, "share": share, "error": 1.7e-3}

    def routed(us: float, share: float, touched: float) -> dict[str, float]:
        return found(us, share) | {"us_per_expert": us / touched}

    missing = {"bitsandbytes NF4-DQ": "ModuleNotFoundError: No module named 'bitsandbytes'"}
    return {
        "hardware": HARDWARE, "versions": {"torch": "2.11.0"}, "ceilings": CEILINGS,
        "bounds": {"ours": 3e-3, "peers": 1e-2}, "quick": True, "formats": ["nf4-dq"],
        "linear4": {
            "shape": [9216, 6144], "nbytes": {"nf4-dq": 29196288, "cuBLAS bf16": 113246208}, "missing": missing,
            "rows": [
                {"M": 1, "kernels": {"nf4-dq": found(11.5, 0.82), "cuBLAS bf16": found(41.9, 0.87)}},
                {"M": 1024, "kernels": {"nf4-dq": found(170.0, 0.05)}},
            ],
        },
        "moe4": {
            "sizes": {"D": 6144, "F": 9216, "E": 32, "A": 2}, "expert_nbytes": {"nf4-dq": 87588864}, "missing": missing,
            "rows": [
                {"M": 1, "touched": 2.0, "kernels": {"nf4-dq": routed(70.0, 0.81, 2)}},
                {"M": 16, "touched": 20.5, "kernels": {"nf4-dq": routed(861.0, 0.7, 20.5)}},
            ],
        },
        "lightning": {
            "heads": 64, "head_dim": 128,
            "rows": [{"batch": 1, "tokens": 1, "us": 6.3, "floor_us": 2.8, "error": 1e-3}],
        },
    }  # fmt: skip


def decode_layer() -> dict[str, Any]:
    """Of benchmarks/decode_layer.py."""
    rows = [{"batch": 1, "us": 141.2, "floor_us": 99.1, "share": 0.7}, {"batch": 8, "us": 700.4}]
    return {
        "hardware": HARDWARE, "ceilings": CEILINGS, "context": 4096, "peers_us": {"a peer": 2000},
        "formats": {"nf4-dq": {"errors": {"decode": 4e-3}, "rows": rows, "kernels_us_a_step": {"skinny": 900.0}}},
    }  # fmt: skip


def prefill_layers() -> dict[str, Any]:
    """Of benchmarks/prefill_layers.py."""
    row = {"chunk": 8192, "seconds": 0.2, "TFLOP_per_s": 383.0, "share": 0.49, "tokens_per_s": 4096}
    return {
        "hardware": HARDWARE, "ceilings": CEILINGS, "tokens": 8192, "layers": 8, "flops": {"experts": 76 * 10**12},
        "peers_tokens_per_s": {"a peer": 2813},
        "formats": {"nf4-dq": {"errors": {"prefill": 4e-3}, "rows": [row], "kernels_us": {"tile": 9e4}}},
    }  # fmt: skip
