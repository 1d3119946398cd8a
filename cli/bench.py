"""`minibble bench`: how fast the kernels are on this machine's GPU."""

from typing import TYPE_CHECKING, Any

import click

from minibble.cli.options import json_option
from minibble.cli.output import ProgressLine, emit_json, show

if TYPE_CHECKING:
    from rich.table import Table


@click.command("bench", short_help="Measure the kernels on this machine's GPU.")
@click.option("--device", metavar="D", help="GPU to measure, such as cuda:1.  [default: the first]")
@click.option("--full", is_flag=True, help="Every number of tokens from 1 to 2048 instead of a few.")
@json_option
def command(device: str | None, full: bool, as_json: bool) -> None:
    """Measure the kernels on this machine's GPU, at the released model's sizes.

    Each is first compared with an exact computation. Those that multiply from 4-bit codes are timed beside
    bitsandbytes, torch's int4 kernel and cuBLAS as far as they are installed. Shares and floors are of what the GPU
    reaches in the same run. Takes about 10 GB of GPU memory, and needs no checkpoint.
    """
    from minibble.runtime.bench.gpu import the_gpu

    chosen = the_gpu(device)
    from minibble.runtime.bench.kernels import measure

    with ProgressLine("bench", unit="measurements") as line:
        result = measure(chosen, quick=not full, progress=line.update)
    if as_json:
        emit_json(result)
    else:
        show(*renderables(result))


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
