"""`minibble bench`: how fast the kernels are on this machine's GPU."""

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from minibble.cli.options import Count, json_option, memory_options
from minibble.cli.output import ProgressLine, emit_json, note, show
from minibble.runtime.footprint import FORMAT_NAMES

if TYPE_CHECKING:
    from rich.table import Table


@click.command("bench", short_help="Measure the kernels, or a whole model, on this machine's GPUs.")
@click.argument("target", metavar="[MODEL]", required=False)
@click.option(
    "--weights",
    type=click.Choice(["dummy"]),
    help="Where MODEL's weights come from: dummy makes random ones on the GPU, so that no file is needed.",
)
@click.option("--format", "format_", type=click.Choice(FORMAT_NAMES), default="nf4-dq", show_default=True)
@click.option(
    "--routing",
    type=click.Choice(["uniform", "zipf"]),
    default="uniform",
    show_default=True,
    help="Which experts dummy routers choose: all alike, or by Zipf's law.",
)
@memory_options
@click.option(
    "--context", type=Count(1), default=8192, show_default=True, metavar="N", help="Tokens before those decoded."
)
@click.option("--batch", default="1", show_default=True, metavar="N[,N...]", help="Sequences at once.")
@click.option("--steps", type=click.IntRange(8), default=64, show_default=True, metavar="N", help="Tokens to decode.")
@click.option("--prompt-tokens", type=Count(), default=8192, show_default=True, metavar="N", help="0 for no prompt.")
@click.option(
    "--device", metavar="D[,D...]", help="GPU to measure, such as cuda:1; of a MODEL, several.  [default: the first]"
)
@click.option("--full", is_flag=True, help="Kernels: every number of tokens from 1 to 2048 instead of a few.")
@json_option
@click.pass_context
def command(ctx: click.Context, target: str | None, device: str | None, full: bool, as_json: bool, **run: Any) -> None:
    """Measure the kernels on this machine's GPU at the released model's sizes; or, with MODEL, the whole of it.

    Kernels are first compared with an exact computation. Those that multiply from 4-bit codes are timed beside
    bitsandbytes, torch's int4 kernel and cuBLAS as far as they are installed. Shares and floors are of what the GPU
    reaches in the same run. Takes about 10 GB of GPU memory, and needs no checkpoint.

    MODEL, a built-in name such as minimax-text-01 or a config.json, is placed within the memory given, and decodes
    and reads a prompt with random weights: what a machine would do before 912 GB are moved to it.
    """
    kernels_only, whole_only = {"full"}, {*run}
    misplaced = [
        name
        for name in (kernels_only if target is not None else whole_only)
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    ]
    if misplaced:
        option = f"--{min(misplaced).removesuffix('_').replace('_', '-')}"
        raise click.UsageError(f"{option} is for {'the kernels, without a MODEL' if target else 'a whole MODEL'}", ctx)
    if target is not None:
        if run["weights"] is None:
            raise click.UsageError("say --weights dummy to measure a whole model", ctx)
        _whole(target, device, as_json, run)
        return
    from minibble.runtime.bench.gpu import the_gpu

    chosen = the_gpu(device)
    from minibble.runtime.bench.kernels import measure

    with ProgressLine("bench", unit="measurements") as line:
        result = measure(chosen, quick=not full, progress=line.update)
    if as_json:
        emit_json(result)
    else:
        show(*renderables(result))


def _whole(target: str, device: str | None, as_json: bool, run: dict[str, Any]) -> None:
    from minibble.quantize.errors import ConfigError
    from minibble.runtime.bench import gpu
    from minibble.runtime.report import memory_report

    devices = gpu.the_gpus(device)
    batches = tuple(int(n) if n.strip().isdigit() else 0 for n in run["batch"].split(","))
    if min(batches) < 1:
        raise ConfigError(f"--batch {run['batch']}: expected numbers of at least 1, separated by commas")
    from minibble.runtime.bench import full, tables

    asked = full.Run(
        format=run["format_"], gpu_memory=run["gpu_memory"], host_memory=run["host_memory"],
        folder=run["offload_folder"], cpu_experts=run["cpu_experts"], routing=run["routing"],
        context=run["context"], batches=batches, steps=run["steps"], prompt=run["prompt_tokens"],
    )  # fmt: skip
    config = memory_report(target).config
    result = {"hardware": [gpu.hardware(d) for d in devices], "versions": gpu.versions(), "model": target}
    result["errors"] = full.gate(devices, asked.format, note, asked.cpu_experts)
    result |= full.measure(config, devices, asked, note)
    if as_json:
        emit_json(result)
    else:
        for line in tables.whole(result):
            show(line)


def renderables(result: dict[str, Any]) -> "list[str | Table]":
    """The result for people: ceilings, a table for each kernel, and what could not be measured."""
    from rich.markup import escape

    from minibble.runtime.bench import tables

    N, K = result["linear4"]["shape"]
    sizes = result["moe4"]["sizes"]
    share = "µs a call (share of reading bandwidth)"
    titles = (
        f"linear4, {K} to {N}: {share}",
        f"moe4, {sizes['A']} of {sizes['E']} experts of {sizes['D']} x {sizes['F']}: {share}",
        "lightning attention of a layer",
    )
    return [
        f"[bold]{escape(tables.ceilings(result))}[/]",
        *(
            table
            for title, make in zip(titles, (tables.linear4, tables.moe4, tables.lightning), strict=True)
            for table in ("", _table(title, *make(result)))
        ),
        *(f"[yellow]·[/] {escape(line)}" for line in tables.missing(result)),
    ]


def _table(title: str, head: list[str], rows: list[list[str]]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
