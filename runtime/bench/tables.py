"""Results of the kernels' benchmark as tables of text, from the JSON alone."""

from collections.abc import Mapping, Sequence
from typing import Any

WARM_STEPS = 8  # of decoding a whole model that are not timed: the first runs launch by launch, the second captures

Table = tuple[list[str], list[list[str]]]  # head, rows


def linear4(result: Mapping[str, Any]) -> Table:
    """Microseconds of every kernel at every M; up to 64 tokens also its share of the reading bandwidth."""
    part = result["linear4"]
    return ["M", *part["nbytes"]], [
        [str(row["M"]), *(_cell(row["kernels"].get(kernel), row["M"] <= 64) for kernel in part["nbytes"])]
        for row in part["rows"]
    ]


def moe4(result: Mapping[str, Any]) -> Table:
    """Microseconds and share of every kernel at every M, and how long one expert takes beside one token's."""
    part = result["moe4"]
    ours = result["formats"]
    head = ["M", "experts read", *part["expert_nbytes"], *(f"{kernel}, an expert over M = 1" for kernel in ours)]
    first = part["rows"][0]["kernels"]
    return head, [
        [
            str(row["M"]), f"{row['touched']:g}",
            *(_cell(row["kernels"].get(kernel), True) for kernel in part["expert_nbytes"]),
            *(f"{row['kernels'][kernel]['us_per_expert'] / first[kernel]['us_per_expert']:.2f}" for kernel in ours),
        ]
        for row in part["rows"]
    ]  # fmt: skip


def lightning(result: Mapping[str, Any]) -> Table:
    """Microseconds of every run, what it could not go below, and how many times that it took."""
    return ["sequences", "tokens of each", "µs", "floor", "over the floor"], [
        [
            str(row["batch"]), str(row["tokens"]), f"{row['us']:.1f}", f"{row['floor_us']:.1f}",
            f"{row['us'] / row['floor_us']:.2f}",
        ]
        for row in result["lightning"]["rows"]
    ]  # fmt: skip


def _cell(found: Mapping[str, float] | None, share: bool) -> str:
    if found is None:
        return "–"
    return f"{found['us']:.1f}" + (f" ({found['share']:.0%})" if share else "")


def missing(result: Mapping[str, Any]) -> list[str]:
    """A line for each peer that could not be measured."""
    found = {**result["linear4"]["missing"], **result["moe4"]["missing"]}
    return [f"not measured: {peer} ({why})" for peer, why in found.items()]


def ceilings(result: Mapping[str, Any]) -> str:
    """The GPU and what it reached in the same run."""
    found, gpu = result["ceilings"], result["hardware"]["gpu"]
    return (
        f"{gpu}: reads {found['read_GB_per_s']:,.0f} GB/s, multiplies bf16 at {found['bf16_TFLOP_per_s']:.0f} TFLOP/s"
    )


def lines(result: Mapping[str, Any]) -> list[str]:
    """Everything, for a log."""
    share = "microseconds (share of reading bandwidth)"
    text = [ceilings(result)]
    for title, make in ((f"linear4: {share}", linear4), (f"moe4: {share}", moe4), ("lightning", lightning)):
        head, rows = make(result)
        text += [title, *_aligned([head, *rows])]
    return text + missing(result)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def whole(run: dict[str, Any]) -> list[str]:
    """A run of a whole model: what was planned and taken, and the rates."""
    plan = run["plan"]
    among = ", the embedding among it" if plan["embedding"] == "host" else ""
    text = [
        f"{run['routing']} routing, loaded in {run['load_s']:.0f} s: {plan['experts']['resident']} experts on GPUs, "
        f"{plan['experts']['pinned']} in host memory ({plan['host_bytes'] / 1e9:.1f} GB{among}), "
        f"{plan['experts']['disk']} on disk ({plan['disk_bytes'] / 1e9:.1f} GB)"
    ]
    for row in run["decode"]:
        if "refused" in row:
            text.append(f"batch {row['batch']}: {row['refused']}")
            continue
        text.append(
            f"batch {row['batch']}: {row['tokens_per_s']:.1f} tokens/s after {row['context']:,} "
            f"(expected with 1: {plan['expected_decode_tokens_per_s']:.1f}){_experts(row)}"
        )
        text += [
            f"  {gpu['device']}: {gpu['driver_bytes'] / 1e9:.2f} GB in use, {predicted / 1e9:.2f} planned"
            for gpu, predicted in zip(row["memory"], row["predicted_bytes"], strict=True)
        ]
    if "prefill" in run:
        prefill = run["prefill"]
        text.append(
            f"prompt of {prefill['tokens']:,}: {prefill['tokens_per_s']:,.0f} tokens/s, {prefill['chunk']:,} at a time"
        )
    return text


def _experts(row: dict[str, Any]) -> str:
    """What had to come for a step."""
    return f"; {missed(row):.1f} experts missed a step" if row["experts"] else ""


def missed(row: Mapping[str, Any]) -> float:
    """Experts that had to come for a step of decoding, those that were not timed included."""
    misses: int = sum(store["misses"] for store in row["experts"])
    return misses / (row["steps"] + WARM_STEPS)
