"""Write docs/performance.md from benchmarks/results/*.json; `--check` only says whether it is up to date.

python tools/make_performance.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minibble.runtime.bench import tables

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# Performance

*Made by `python tools/make_performance.py` from `benchmarks/results/`; do not edit.*

Every script in `benchmarks/` checks that what it measures is right before it measures it, and writes its figures with
the hardware and the versions to `benchmarks/results/`.
"""


def render() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD,
            *full_size(),
            *kernels(),
            *small_kernels(),
            *decode_layer(),
            *prefill_layers(),
            *quality_gpu(),
            quality(),
            calibrated_quality(),
            calibrate_gpu(),
            quantize_gpu(),
            run_gpu(),
            quantize_cpu(),
            decode_cpu(),
            rest(),
        ]
    )


def full_size() -> list[str]:
    """The whole model in several budgets of memory."""
    results = [
        read(path.stem)
        for path in sorted(RESULTS.glob("full_size_*.json"), key=lambda path: (len(path.stem), path.stem))
    ]
    if not results:
        return []
    text = (
        "`benchmarks/full_size.py`, also `minibble bench minimax-text-01 --weights dummy`: all 80 layers and 2,560 "
        "experts with random weights in nf4-dq, through `generate()` with sampling, after a context of 8,192 tokens. "
        "GPU memory is what drivers count, the CUDA context included, at most after decoding and the prompt, and in "
        "brackets what was planned; a plan for 32 sequences has room for prompts of all at once, which were not run. "
        "Routers are given noise where it matters which experts come, so that each token has its own: uniformly, or by "
        "Zipf's law with exponent 1. Logits with experts off the GPU were the same to the bit. Behind the rate is what "
        "the plan expected; hosts of one kind differ by a tenth and more where experts come from host memory. "
        "Experts in host memory are read there by the kernels where none is on disk, else copied. "
        "Divided are those of which the CPU computes a part when they miss (`--cpu-experts`), in one run with the rows "
        "without. "
        "transformers with bitsandbytes, expert by expert (H200): 6.2 tokens/s, prompts 2,813."
    )
    head = ["GPUs", "allowed", "routing", "experts on GPU, host, disk", "missed a token", "tokens/s", "32 at once",
            "prompt of 8,192, tokens/s", "GPU memory, GB"]  # fmt: skip
    rows = [_full_row(r, run) for r in results for run in r["runs"]]
    return [section("The whole model", text, head, rows)]


def _full_row(r: dict[str, Any], run: dict[str, Any]) -> list[str]:
    plan, by_batch = run["plan"], {row["batch"]: row for row in run["decode"] if "refused" not in row}
    one, many = by_batch[1], by_batch.get(32)
    experts, phases = plan["experts"], [*by_batch.values(), *([run["prefill"]] if "prefill" in run else [])]
    used = max(sum(gpu["driver_bytes"] for gpu in phase["memory"]) for phase in phases)
    planned = max(sum(row["predicted_bytes"]) for row in by_batch.values())
    missed = tables.missed(one)
    names = [gpu["gpu"].removeprefix("NVIDIA ").split()[0] for gpu in r["hardware"][: len(plan["devices"])]]
    allowed = sum(device["budget_bytes"] for device in plan["devices"])
    return [
        f"{len(names)} × {names[0]}" + (f", {plan['cpu_experts']} divided" if plan.get("cpu_experts") else ""),
        f"{allowed / 1e9:.1f} GB",
        run["routing"],
        f"{experts['resident']:,}, {experts['pinned']:,}, {experts['disk']:,}",
        f"{missed:.1f}" if missed else "",
        f"**{one['tokens_per_s']:.1f}** ({plan['expected_decode_tokens_per_s']:.1f})",
        "" if many is None else f"{many['tokens_per_s']:.0f}",
        f"{run['prefill']['tokens_per_s']:,.0f}" if "prefill" in run else "",
        f"{used / 1e9:.1f} ({planned / 1e9:.1f})",
    ]


def kernels() -> list[str]:
    """linear4 and moe4 beside their peers, a table each for every GPU that was measured."""
    found = []
    for r in of_each_gpu("kernels"):
        N, K = r["linear4"]["shape"]
        sizes = r["moe4"]["sizes"]
        text = (
            f"`benchmarks/kernels.py`. {tables.ceilings(r)}, both in the same run, in which everything here was "
            f"measured. Microseconds a call (share of the reading bandwidth), medians of CUDA graphs over weights "
            f"rotated past the L2 cache, errors at most {r['bounds']['ours']:.0e} against float64. "
        )
        left_out = "".join(f" {line[0].upper()}{line[1:]}." for line in tables.missing(r))
        linear = f"One matrix, {K} to {N}, M tokens, bfloat16.{left_out}"
        moe = (
            f"{sizes['A']} of {sizes['E']} experts of {sizes['D']} x {sizes['F']} for each of M tokens; the last "
            "columns are the time for each expert whose weights are read, as a multiple of that at M = 1. Peers go "
            "expert by expert and know beforehand which tokens each has."
        )
        found += [
            section(f"4-bit products, {r['hardware']['gpu']}", text + linear, *tables.linear4(r)),
            section(f"Routed experts, {r['hardware']['gpu']}", moe, *tables.moe4(r)),
        ]
    return found


def small_kernels() -> list[str]:
    """Lightning attention, norms and the router beside the time that their bytes take."""
    text = (
        "`benchmarks/small_kernels.py`: one layer's, from what each reads in memory to what it leaves there; floors "
        "are bytes at the reading bandwidth of the same run. Lightning attention goes from the projections to the "
        "gated output, state in float32: sequences x tokens; a prefill leaves the norm's factor of each token to the "
        "product that follows, as the model does."
    )
    head = ["", "", "\u00b5s", "floor", "error"]
    return [
        section(f"Lightning attention, norms and router, {r['hardware']['gpu']}", text, head, small_rows(r))
        for r in of_each_gpu("small_kernels")
    ]


def small_rows(r: dict[str, Any]) -> list[list[str]]:
    return [
        [row["kernel"], row["shape"], f"{row['us']:.1f}", f"{row['floor_us']:.1f}", f"{row['error']:.1e}"]
        for row in r["rows"]
    ]


def decode_layer() -> list[str]:
    results = of_each_gpu("decode_layer")
    if not results:
        return []
    first = results[0]
    peers = ", ".join(f"{name}: {us:,} µs" for name, us in first["peers_us"].items())
    batches = [row["batch"] for row in next(iter(first["formats"].values()))["rows"]]
    text = (
        "`benchmarks/decode_layer.py`: a token of each sequence through a layer of the released size, attention and "
        "experts, microseconds in a CUDA graph, mean of seven lightning layers and one softmax layer that sees "
        f"{first['context']} tokens. The floor is the bytes of one token over the reading bandwidth of the same run. "
        f"{peers}."
    )
    rows = [
        [
            r["hardware"]["gpu"], name, f"{found['rows'][0]['floor_us']:.0f}",
            *(f"**{row['us']:.0f}**" if row["batch"] == 1 else f"{row['us']:.0f}" for row in found["rows"]),
        ]
        for r in results
        for name, found in r["formats"].items()
    ]  # fmt: skip
    return [section("A decode layer", text, ["", "", "floor", *(f"batch {batch}" for batch in batches)], rows)]


def prefill_layers() -> list[str]:
    results = of_each_gpu("prefill_layers")
    if not results:
        return []
    first = results[0]
    peers = ", ".join(f"{name}: {rate:,}" for name, rate in first["peers_tokens_per_s"].items())
    text = (
        f"`benchmarks/prefill_layers.py`: {first['tokens']} tokens through {first['layers']} layers of the released "
        f"size, {sum(first['flops'].values()) / 1e12:.0f} TFLOP, so many tokens at a time; the share is of cuBLAS on "
        f"8192 x 8192 x 8192 in the same run. Tokens per second over 80 layers: {peers}."
    )
    head = ["", "", "tokens at a time", "ms", "TFLOP/s", "share", "tokens/s over 80 layers"]
    rows = [
        [
            r["hardware"]["gpu"], name, str(row["chunk"]), f"{1e3 * row['seconds']:.0f}", f"{row['TFLOP_per_s']:.0f}",
            f"{row['share']:.0%}", f"{row['tokens_per_s']:,}",
        ]
        for r in results
        for name, found in r["formats"].items()
        for row in found["rows"]
    ]  # fmt: skip
    return [section("Prefill", text, head, rows)]


def quality_gpu() -> list[str]:
    """KL divergence by each set of kernels."""
    measured = of_each_gpu("quality_gpu")
    if not measured:
        return []
    ways = ("many_tokens", "single_tokens", "bfloat16")
    rows = [
        [
            r["hardware"]["gpu"],
            name,
            f"{row['float32']:.6f}",
            *(f"{row[way] / row['float32'] - 1:+.2%}" for way in ways),
        ]
        for r in measured
        for name, row in r["formats"].items()
    ]
    text = (
        f"`benchmarks/quality_gpu.py`: {measured[0]['source']}, nearest NF4 and calibrated int4; KL divergence to the "
        f"source over {measured[0]['tokens']:,} tokens by the reference kernels in float32, and how far it is from "
        "that with bfloat16 activations: by the kernels for many tokens, by those of decode steps, and by the "
        "reference kernels themselves. Bound for ours: no more than 1 % above these, nor below float32."
    )
    head = ["", "", "KL in float32", "many tokens", "token by token", "reference kernels"]
    return [section("Quality through the GPU's kernels", text, head, rows)]


def quality() -> str:
    r = read("quality")
    rows = [
        [name, f"{r[name]['kl']:.5f}", f"{r[name]['top1_agreement']:.2%}", f"{r[name]['perplexity']:.3f}"]
        for name in ("minibble", "bitsandbytes")
    ]
    text = (
        f"`benchmarks/quality.py`: {r['source']}, a trained model of 24.7 M parameters, {r['matrices']} matrices in "
        f"NF4 with double quantization, {r['minibble']['tokens']:,} tokens; the source's perplexity is "
        f"{r['minibble']['source_perplexity']:.3f}. bitsandbytes decodes our files to the same bits; its own scales "
        "are rounded a little differently."
    )
    return section("Quality of rounding to nearest", text, ["", "KL to the source, nats", "top-1", "perplexity"], rows)


def calibrated_quality() -> str:
    a, demo = read("calibrate_quality"), read("calibrate_quality_demo")
    rows = [
        [
            name, f"{way['kl']:.5f}", f"**{way['share']:.3f}**", f"{way['top1_agreement']:.2%}",
            f"{way['perplexity']:.2f}", f"{demo['ways'][name]['share']:.3f}",
            f"{demo['ways'][name]['top1_agreement']:.2%}",
        ]
        for name, way in a["ways"].items()
    ]  # fmt: skip
    text = (
        f"`benchmarks/calibrate_quality.py`: {a['source']}, calibrated on {a['calibration']} of its "
        f"training text, scored on {a['ways']['NF4, nearest']['tokens']:,} tokens it has never seen; and the built-in "
        f"model, {demo['calibration']}. "
        "`share` is the KL divergence as a share of nearest NF4's; differences under 2 % are noise. Others' tools on "
        "reference-a, same bits: llm-compressor GPTQ 0.86 (0.77 with its MSE observer), GPTQModel 0.86, HQQ g64 0.84, "
        "AutoRound 0.60."
    )
    head = ["", "KL, nats", "share", "top-1", "perplexity", "built-in model: share", "top-1"]
    return section("Quality of calibration", text, head, rows)


def calibrate_gpu() -> str:
    names = {
        "calibrate_gpu": "NF4, lightning layer", "calibrate_gpu_softmax": "NF4, softmax layer",
        "calibrate_gpu_gptq": "int4 g128, lightning layer", "calibrate_gpu_24GB": "NF4, lightning layer, 24 GB card",
    }  # fmt: skip
    results = {title: read(name) for name, title in names.items()}
    first, whole = next(iter(results.values())), read("calibrate_real_size")
    rows = [
        [
            title, f"**{r['layer_s']:.1f}**", f"{r['layers_80_min']:.0f}", f"{r['peak_reserved_GB']:.1f}",
            f"{r['peak_allocated_GB']:.1f}", f"{r['predicted_GB']:.1f}", str(r["plan"]["experts_at_once"]),
            *(f"{seconds:.2f}" for seconds in r["stages_s"].values()),
        ]
        for title, r in results.items()
    ]  # fmt: skip
    text = (
        f"`benchmarks/calibrate_gpu.py`, {first['hardware']['gpu']}: a layer of the released model, 262,144 tokens, "
        "all that `minibble quantize` does but reading and writing files; the floor derived for an H100 is "
        f"{first['floor_h100_s']:.0f} s. Stages are from a second run with clocks. The 24 GB card is a bound of 23 GB "
        "on what torch may take. The whole command, files included (`benchmarks/calibrate_real_size.py`): "
        f"{whole['what']}, {whole['source_bytes'] / 1e9:.1f} GB on {whole['calibration']['tokens']:,} tokens in "
        f"{whole['elapsed_s']:.0f} s, verified and run."
    )
    head = ["", "s a layer", "min for 80", "GB taken", "GB alive", "GB predicted", "experts at once"]
    return section("Calibrating on a GPU", text, head + list(first["stages_s"]), rows)


def quantize_gpu() -> str:
    r = read("quantize_gpu")
    layer = r["layer_GB_per_s"]
    rows = [
        ["encode", f"{layer['encode']:.0f}"],
        ["with the finite check and the error of each matrix", f"{layer['encode_checked']:.0f}"],
        ["and packed in host memory", f"{layer['to_host']:.0f}"],
    ]
    text = (
        f"`benchmarks/quantize_gpu.py`, {r['hardware']['gpu']}: the matrices of a real lightning layer, bfloat16 on "
        f"the device; memory reads at {r['read_GB_per_s']:.0f} GB/s in the same run."
    )
    return section("Quantizing on a GPU", text, ["", "GB/s of 16-bit source"], rows)


def run_gpu() -> str:
    r = read("run_gpu")
    rows = [
        ["predicted / measured peak", f"{r['predicted_bytes'] / 1e9:.3f} / {r['peak_gpu_bytes'] / 1e9:.3f} GB"],
        ["decode, batch 1", f"{r['decode_tokens_per_s']:.0f} tokens/s"],
        ["float32 logits against the reference kernels", f"{r['logits_error']:.1e}"],
    ]
    text = (
        f"`benchmarks/run_gpu.py`, {r['gpu']}: `minibble run` of {r['layers']} layers of the real size (one lightning, "
        f"one softmax) with embedding and head, {r['checkpoint_bytes'] / 1e9:.1f} GB, prompt of {r['prompt_tokens']} "
        "tokens. Matrices are decoded by one Triton kernel and multiplied by cuBLAS, without the kernels above."
    )
    return section("Running on a GPU, plain path", text, ["", ""], rows)


def quantize_cpu() -> str:
    r = read("quantize_cpu")
    rows = [
        [name, f"{1000 * r['GB_per_s'][key]:.0f}", f"{r['GB_per_s'][key] / r['GB_per_s']['bitsandbytes']:.2f}"]
        for name, key in (
            ("bitsandbytes, quantize_4bit alone", "bitsandbytes"),
            ("minibble, encode alone", "encode"),
            ("minibble, end to end", "end_to_end"),
        )
    ]
    text = (
        f"`benchmarks/quantize_cpu.py`, {r['hardware']['cpu']}, {r['hardware']['threads']} threads: {r['matrices']} "
        "small matrices; end to end reads, checks, encodes, measures the error, hashes and writes."
    )
    return section("Quantizing on a CPU", text, ["", "MB/s of 16-bit source", "of bitsandbytes"], rows)


def decode_cpu() -> str:
    runs = [(name, read(name)) for name in ("decode_cpu_avx512bf16", "decode_cpu", "decode_cpu_1thread")]
    keys = ("minibble nf4", "transformers bf16", "transformers float32", "minibble 16-bit weights, float32")
    rows = [
        [
            f"{'AVX512-BF16' if 'avx512_bf16' in r['machine']['features'] else 'AVX2 only'}, "
            f"{r['machine']['threads']} threads, path `{r['machine']['nf4_path']}`",
            *(f"{r['tokens_per_s'][key]:.0f}" for key in keys),
            f"{r['nf4_over_transformers_bf16']:.2f}",
        ]
        for _, r in runs
    ]
    text = (
        "`benchmarks/decode_cpu.py`: greedy decoding of the same model, batch 1, tokens per second. On CPUs with "
        "AVX512-BF16 bitsandbytes multiplies from the codes, elsewhere our compiled loop does."
    )
    return section("Decoding on a CPU", text, ["", *keys, "NF4 over transformers bf16"], rows)


def rest() -> str:
    kills, calibrated, imports = read("kill_resume"), read("kill_resume_calibrated"), read("import_time")
    rows = [
        [
            "`benchmarks/kill_resume.py`",
            f"{kills['identical']} of {len(kills['trials'])} killed jobs ended byte-identical",
        ],
        [
            "the same, calibrated on the built-in model",
            f"{calibrated['identical']} of {len(calibrated['trials'])} killed jobs ended byte-identical",
        ],
        ["`benchmarks/import_time.py`", f"`import minibble` takes {1000 * imports['import_s']:.0f} ms"],
    ]
    return section("Other claims", "", ["", ""], rows)


def section(title: str, text: str, head: list[str], rows: list[list[str]]) -> str:
    """A heading, a paragraph and a table."""
    lines = [f"## {title}", "", *([text, ""] if text else [])]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def of_each_gpu(name: str) -> list[dict[str, Any]]:
    """The results called NAME_GPU.json, by name."""
    return [read(path.stem) for path in sorted(RESULTS.glob(f"{name}_*.json"))]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = render()
    if not parser.parse_args().check:
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        sys.exit(f"{TARGET.name} is out of date: run python tools/make_performance.py")


if __name__ == "__main__":
    main()
