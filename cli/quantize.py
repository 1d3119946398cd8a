"""`minibble quantize`: a 16-bit checkpoint becomes a 4-bit one."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from minibble.cli.options import SIZE, device_option, json_option
from minibble.cli.output import ProgressLine, duration, emit_json, show
from minibble.quantize.sizes import binary, decimal

if TYPE_CHECKING:
    from minibble.quantize.job import QuantizePlan, QuantizeResult


@click.command("quantize", short_help="Turn a 16-bit checkpoint into a 4-bit one.")
@click.argument("source", metavar="SOURCE")
@click.argument("out", metavar="OUT")
@click.option(
    "--method", type=click.Choice(["nf4"]), default="nf4", show_default=True, help="How weights become 4-bit."
)
@click.option("--no-double-quant", is_flag=True, help="Keep the block scales in float32 instead of 8 bit.")
@click.option("--quantize-head", is_flag=True, help="Make lm_head 4-bit too.")
@click.option("--quantize-embedding", is_flag=True, help="Make the embedding 4-bit too.")
@click.option("--shard-size", type=SIZE, default="5GB", show_default=True, help="Largest file to write.")
@device_option
@click.option("--resume", is_flag=True, help="Go on with an OUT that was interrupted.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@json_option
def command(
    source: str,
    out: str,
    no_double_quant: bool,
    device: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantize the 16-bit checkpoint SOURCE into the new folder OUT.

    SOURCE is a folder of safetensors, or `demo`, the tiny built-in model. Every expert and attention matrix
    becomes 4-bit NF4, in bitsandbytes' own file format; routers and norms stay in 16 bit, and so do the
    embedding and the head unless asked. One matrix is in memory at a time.
    """
    settings["double_quant"] = not no_double_quant
    if dry_run:
        _dry_run(source, out, settings, as_json)
        return
    settings |= {"device": device, "resume": resume}
    from minibble.quantize.job import quantize_checkpoint

    with ProgressLine("quantize") as line:
        result = quantize_checkpoint(
            source, out, progress=lambda p: line.update(p.done_bytes, p.total_bytes, p.current), **settings
        )
    if as_json:
        emit_json(result_json(result))
    else:
        from rich.markup import escape

        show(f"[green]✓[/] {escape(str(result.out))}", *_summary(result.plan, "became"), _speed(result))


def _dry_run(source: str, out: str, settings: dict[str, Any], as_json: bool) -> None:
    from minibble.quantize.job import plan_quantize

    plan = plan_quantize(source, out, **settings)
    if as_json:
        emit_json({"out": out, "dry_run": True, **plan_json(plan)})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("file", "bytes", "", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for filename, nbytes in plan.shards:
        table.add_row(filename, f"{nbytes:,}", f"[dim]{decimal(nbytes)}[/]")
    show(f"Would write to {escape(out)}:", table, *_summary(plan, "would become"))


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
    return {
        "out": str(result.out),
        "dry_run": False,
        **plan_json(result.plan),
        "elapsed_s": result.elapsed_s,
        "bytes_per_s": result.plan.source_bytes / max(result.elapsed_s, 1e-9),
        "relative_error": result.relative_error,
    }


def _summary(plan: "QuantizePlan", verb: str) -> list[str]:
    ratio = plan.source_bytes / plan.output_bytes
    return [
        f"  {plan.quantized_tensors:,} matrices 4-bit, {plan.kept_tensors:,} tensors kept in 16 bit",
        f"  {decimal(plan.source_bytes)} {verb} "
        f"[bold]{decimal(plan.output_bytes)}[/] ({binary(plan.output_bytes)}), {ratio:.2f} times smaller: "
        f"{plan.bits_per_weight:.3f} bits per weight",
    ]


def _speed(result: "QuantizeResult") -> str:
    rate = decimal(result.plan.source_bytes / max(result.elapsed_s, 1e-9))
    return f"  {duration(result.elapsed_s)}, {rate}/s; mean relative error {result.relative_error:.4f}"
