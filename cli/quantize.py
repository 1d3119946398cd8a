"""`minibble quantize`: a 16-bit checkpoint becomes a 4-bit one."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from minibble.cli.options import SIZE, device_option, json_option
from minibble.cli.output import ProgressLine, duration, emit_json, note, show
from minibble.quantize.sizes import binary, decimal

if TYPE_CHECKING:
    from minibble.calibrate.job import CalibratedJob
    from minibble.calibrate.stream import LayerReport
    from minibble.quantize.job import NearestJob, QuantizePlan, QuantizeResult


@click.command("quantize", short_help="Turn a 16-bit checkpoint into a 4-bit one.")
@click.argument("source", metavar="SOURCE")
@click.argument("out", metavar="OUT")
@click.option(
    "--method",
    type=click.Choice(["nf4", "gptq"]),
    default="nf4",
    show_default=True,
    help="nf4 in bitsandbytes' files, or int4 in GPTQ's; gptq always calibrates.",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="Choose codes by what this text makes of them: a file (text or JSON lines), - for standard input, demo, "
    "wikitext2 or c4.  [default for gptq: demo]",
)
@click.option("--samples", type=int, metavar="N", help="Windows of the text.  [default: 128, or all there are]")
@click.option("--seq-len", type=int, metavar="T", help="Tokens of a window.  [default: 2048]")
@click.option("--seed", type=int, metavar="S", help="Which windows.  [default: 0]")
@click.option("--group-size", type=int, metavar="G", help="Weights that share a scale in int4: 32, 64 or 128.")
@click.option("--damp", type=float, help="Share of a Hessian's mean diagonal added to it.  [default: 0.05]")
@click.option("--act-order/--no-act-order", default=None, help="Feed errors back in the order of activation, or not.")
@click.option("--sweeps", type=int, help="Sweeps of coordinate descent after error feedback.  [default: 6]")
@click.option(
    "--router-weights/--no-router-weights",
    default=None,
    help="Let tokens count by the weight that an expert's output gets, or all the same.",
)
@click.option("--strict", is_flag=True, default=None, help="Fail where an expert gets too few tokens to calibrate.")
@click.option("--gpu-memory", type=SIZE, metavar="SIZE", help="Most to take of the GPU, calibrating.")
@click.option("--no-double-quant", is_flag=True, help="Keep the block scales in float32 instead of 8 bit.")
@click.option("--quantize-head", is_flag=True, help="Make lm_head 4-bit too, rounded to nearest.")
@click.option("--quantize-embedding", is_flag=True, help="Make the embedding 4-bit too, rounded to nearest.")
@click.option("--shard-size", type=SIZE, default="5GB", show_default=True, help="Largest file to write.")
@device_option
@click.option("--resume", is_flag=True, help="Go on with an OUT that was interrupted.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@json_option
def command(
    source: str, out: str, no_double_quant: bool, resume: bool, dry_run: bool, as_json: bool, **given: Any
) -> None:
    """Quantize the 16-bit checkpoint SOURCE into the new folder OUT.

    SOURCE is a folder of safetensors, or `demo`, the tiny built-in model. Every expert and attention matrix
    becomes 4-bit; routers and norms stay in 16 bit, and so do the embedding and the head unless asked.

    Without --calibration, NF4 rounds each weight to the nearest level, one matrix in memory at a time. With it, the
    text runs through the model layer by layer, and codes are chosen so that what each layer gives is kept: better by
    far, in files of the same size. The memory it takes is told first; a GPU of 24 GB does for the released model.
    """
    # Segments that grow: the plan's bytes are then what is taken, but for 4 % instead of 17.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from minibble.calibrate.job import open_job

    settings = {name: value for name, value in given.items() if value is not None}
    job = open_job(source, out, double_quant=not no_double_quant, **settings)
    if dry_run:
        _dry_run(job, as_json)
        return
    result = _execute(job, resume)
    if as_json:
        emit_json(result_json(result) | _calibration_json(job))
    else:
        from rich.markup import escape

        show(f"[green]✓[/] {escape(str(result.out))}", *_summary(result.plan, "became"), *_outcome(result))


def _execute(job: "NearestJob | CalibratedJob", resume: bool) -> "QuantizeResult":
    from minibble.calibrate.job import CalibratedJob

    with ProgressLine("quantize") as line:

        def progress(p: Any) -> None:
            line.update(p.done_bytes, p.total_bytes, p.current)

        if not isinstance(job, CalibratedJob):
            return job.execute(resume, progress)
        for text in _calibration_lines(job):
            note(text)
        return job.execute(resume, progress, lambda report: note(_layer_line(report)))


def _layer_line(report: "LayerReport") -> str:
    fallbacks = f", {report.fallbacks} rounded to nearest" if report.fallbacks else ""
    return (
        f"layer {report.index + 1} of {report.layers}: output error {report.output_error:.5f}, "
        f"{min(report.expert_tokens):,} to {max(report.expert_tokens):,} tokens an expert{fallbacks}; "
        f"{duration(report.elapsed_s)}"
    )


def _calibration_lines(job: "CalibratedJob") -> list[str]:
    text = job.text
    return [
        f"calibration: {text.source}, {text.samples} x {text.seq_len} tokens, seed {text.seed}",
        f"memory: {job.memory.describe()}",
    ]


def _calibration_json(job: "NearestJob | CalibratedJob") -> dict[str, Any]:
    from minibble.calibrate.job import CalibratedJob

    if not isinstance(job, CalibratedJob):
        return {}
    return {"calibration": job.text.to_json(), "memory": job.memory.to_json()}


def _dry_run(job: "NearestJob | CalibratedJob", as_json: bool) -> None:
    from minibble.calibrate.job import CalibratedJob

    plan = job.plan
    if as_json:
        emit_json({"out": str(job.out), "dry_run": True, **plan_json(plan), **_calibration_json(job)})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("file", "bytes", "", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for filename, nbytes in plan.shards:
        table.add_row(filename, f"{nbytes:,}", f"[dim]{decimal(nbytes)}[/]")
    calibration = _calibration_lines(job) if isinstance(job, CalibratedJob) else []
    show(f"Would write to {escape(str(job.out))}:", table, *_summary(plan, "would become"))
    show(*(f"  {escape(line)}" for line in calibration))


def plan_json(plan: "QuantizePlan") -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "quantized_tensors": plan.quantized_tensors,
        "kept_tensors": plan.kept_tensors,
        "shards": [{"file": name, "bytes": nbytes} for name, nbytes in plan.shards],
        "settings": asdict(plan.settings),
    }


def result_json(result: "QuantizeResult") -> dict[str, Any]:
    """A finished job as plain data."""
    calibrated = {key: result.totals[key] for key in ("mean_output_error", "fallbacks") if key in result.totals}
    return {
        "out": str(result.out),
        "dry_run": False,
        **plan_json(result.plan),
        "elapsed_s": result.elapsed_s,
        "bytes_per_s": result.plan.source_bytes / max(result.elapsed_s, 1e-9),
        "relative_error": result.relative_error,
        **calibrated,
    }


def _summary(plan: "QuantizePlan", verb: str) -> list[str]:
    ratio = plan.source_bytes / plan.output_bytes
    return [
        f"  {plan.quantized_tensors:,} matrices 4-bit, {plan.kept_tensors:,} tensors kept in 16 bit",
        f"  {decimal(plan.source_bytes)} {verb} "
        f"[bold]{decimal(plan.output_bytes)}[/] ({binary(plan.output_bytes)}), {ratio:.2f} times smaller: "
        f"{plan.bits_per_weight:.3f} bits per weight",
    ]


def _outcome(result: "QuantizeResult") -> list[str]:
    rate = decimal(result.plan.source_bytes / max(result.elapsed_s, 1e-9))
    lines = [f"  {duration(result.elapsed_s)}, {rate}/s; mean relative error {result.relative_error:.4f}"]
    if "mean_output_error" in result.totals:
        fallbacks = result.totals["fallbacks"]
        lines.append(
            f"  mean output error {result.totals['mean_output_error']:.5f}; "
            + (f"[yellow]{fallbacks} matrices rounded to nearest, see {result.manifest.name}[/]" if fallbacks
               else "no expert short of tokens")
        )  # fmt: skip
    return lines
