"""`minibble report`: where every byte goes, before anything is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minibble.cli.options import COUNT, GPUS, SIZE, SIZE_OR_NOTHING, json_option
from minibble.cli.output import console, emit_json, note
from minibble.quantize.sizes import binary, decimal
from minibble.runtime.footprint import FORMAT_NAMES, FORMAT_NOTES, PARTS, Footprint

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from minibble.runtime.report import MemoryReport

# Per part: colour on a terminal, and the character that tells it apart without colour.
STYLES = {
    "experts": ("cyan", "█"),
    "attention": ("magenta", "▓"),
    "embeddings": ("yellow", "▒"),
    "other": ("white", "░"),
}
MAX_WIDTH = 110
LABEL, COLUMN = 14, 15  # characters
LEAST_WANTED = ("nf4", "nf4-dq-all", "int4-g128")  # the order in which a narrow terminal goes without
UNITS = ((1e9, "GB", 2**30, "GiB"), (1e6, "MB", 2**20, "MiB"), (1e3, "kB", 2**10, "KiB"))


@click.command("report", short_help="Say where every byte of a model goes.")
@click.argument("target", metavar="TARGET")
@click.option(
    "--context",
    type=COUNT,
    default=8192,
    show_default=True,
    metavar="N",
    help="Tokens per sequence, for the KV cache; 8k is 8000, 8Ki 8192, 1M a million.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMAT_NAMES),
    help="Format that the totals speak of.  [default: what is on disk; nf4-dq where there are no weights]",
)
@click.option(
    "--gpu-memory",
    type=SIZE,
    metavar="SIZE",
    help="Plan a run that never takes more than this on all GPUs together; alone, on one.",
)
@click.option("--gpus", type=GPUS, metavar="LIST", help="Plan a run on these GPUs: 2x141GB, or 80GB,141GB.")
@click.option(
    "--host-memory",
    type=SIZE_OR_NOTHING,
    metavar="SIZE",
    help="Most memory to pin for experts that do not fit.  [default: what is needed]",
)
@click.option(
    "--disk", type=SIZE_OR_NOTHING, metavar="SIZE", help="Most bytes of experts to read from disk.  [default: none]"
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the report as one self-contained page.",
)
@json_option
def command(
    target: str,
    context: int,
    batch: int,
    format_: str | None,
    html: Path | None,
    as_json: bool,
    **machine: Any,
) -> None:
    """Say where every byte of a model goes: experts, attention, embeddings, KV cache, state.

    TARGET is a checkpoint folder (its bytes on disk), a config.json, or a built-in model: minimax-text-01,
    minimax-m1 or demo. GB is 1e9 bytes, GiB is 2^30. With --gpu-memory or --gpus it also says which layers and experts
    go where, and how fast that should decode.
    """
    from minibble.runtime.report import memory_report

    report = memory_report(target, context=context, batch=batch, format=format_, **machine)
    if html is not None:
        from minibble.cli.report_html import page

        html.write_text(page(report), encoding="utf-8")
        note(f"wrote {html}")
    if as_json:
        emit_json(report.to_json())
    elif html is None:
        show_report(report)


def show_report(report: "MemoryReport") -> None:
    """Print the report on stdout for a person."""
    out = console()
    for renderable in _renderables(report, out.width):
        out.print(renderable)


def headline(report: "MemoryReport") -> tuple[str, str]:
    """Parameters and layers in two lines of plain text."""
    from minibble.quantize.inventory import active_parameters

    config = report.config
    lightning, softmax = (config.attention.count(kind) for kind in ("lightning", "softmax"))
    return (
        f"{count(report.parameters)} parameters, {count(active_parameters(config))} active per token",
        f"{lightning} lightning and {softmax} softmax layers, "
        f"{config.num_experts} experts each, {config.experts_per_token} per token",
    )


def count(number: float) -> str:
    """456.09 B, 24.71 M or 3.20 k."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:g}"


def columns(report: "MemoryReport") -> dict[str, Footprint]:
    """What is compared: the bytes on disk, if there are any, and each format."""
    stored = {"on disk": report.weights} if report.stored else {}
    return {**stored, **report.formats}


def units(footprints: Sequence[Footprint]) -> tuple[float, str, float, str]:
    """The decimal and the binary unit that suit the largest of the totals."""
    largest = max(weights.total_bytes for weights in footprints)
    return next((unit for unit in UNITS if largest >= unit[0]), UNITS[-1])


def running_text(report: "MemoryReport") -> str:
    """KV cache, state and the sum, in one sentence."""
    tokens = f"{report.context:,} tokens" + (f" in each of {report.batch:,} sequences" if report.batch > 1 else "")
    return (
        f"{tokens}:\n  weights {decimal(report.weights.total_bytes)} + KV cache {decimal(report.kv_cache_bytes)} "
        f"+ state {decimal(report.state_bytes)} = {decimal(report.running_bytes)} ({binary(report.running_bytes)})"
    )


def _renderables(report: "MemoryReport", width: int) -> "list[RenderableType]":
    from rich.markup import escape

    chosen = "on disk" if report.stored else report.weights.format
    shown = columns(report)
    for least in LEAST_WANTED:
        if width < LABEL + COLUMN * len(shown) and least != chosen:
            shown.pop(least, None)
    name = f"[bold]{escape(report.target)}[/]"
    if report.stored:
        name += f", {report.weights.format} on disk"
    return [
        "\n".join((name, *(f"[dim]{line}[/]" for line in headline(report)))),
        _table(shown, chosen),
        *_bars(shown, chosen, width),
        "",
        f"To run in {report.weights.format}, {running_text(report)}",
        *_placement(report),
        *_quality(report),
        *(f"[dim]{name:<10}  {FORMAT_NOTES[name]}[/]" for name in FORMAT_NAMES if name in shown),
    ]


def _placement(report: "MemoryReport") -> "list[RenderableType]":
    if report.placement is None:
        return []
    from minibble.cli.report_placement import renderables

    return ["", *renderables(report.placement)]


def _quality(report: "MemoryReport") -> "list[RenderableType]":
    """What the manifest says of the checkpoint's quality, in a few lines; nothing where it says nothing."""
    if report.quality is None:
        return []
    from rich.markup import escape
    from rich.padding import Padding

    from minibble.cli.report_quality import summary

    first, *rest = (escape(line) for line in summary(report.quality))
    return ["", f"Quality: {first}", *(Padding(line, (0, 0, 0, 2), expand=False) for line in rest), ""]


def _table(shown: Mapping[str, Footprint], chosen: str) -> "Table":
    from rich import box
    from rich.table import Table

    decimal_scale, decimal_unit, binary_scale, binary_unit = units(list(shown.values()))
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("")
    for name in shown:
        header = f"{name}\n{decimal_unit:>6} {binary_unit:>7}"
        table.add_column(header, justify="right", style="bold" if name == chosen else "", no_wrap=True)

    def cells(values: Sequence[int]) -> list[str]:
        return [f"{value / decimal_scale:6.2f} [dim]{value / binary_scale:7.2f}[/]" for value in values]

    for part in PARTS:
        table.add_row(f"[{STYLES[part][0]}]{part}[/]", *cells([w.parts[part] for w in shown.values()]))
    table.add_section()
    table.add_row("[bold]total[/]", *cells([weights.total_bytes for weights in shown.values()]))
    table.add_row("bits/weight", *(f"{weights.bits_per_weight:.3f}" for weights in shown.values()))
    return table


def _bars(shown: Mapping[str, Footprint], chosen: str, width: int) -> "list[Text]":
    """A bar for each column on one scale, and the key to its characters with the shares of the chosen one."""
    from rich.text import Text

    largest = max(weights.total_bytes for weights in shown.values())
    room = min(width, MAX_WIDTH) - 26
    lines = []
    for name, weights in shown.items():
        line = Text(f"{name:<11}")
        for part, cells in bar_cells(weights.parts, room / largest).items():
            colour, character = STYLES[part]
            line.append(character * cells, style=colour)
        lines.append(line.append(f" {decimal(weights.total_bytes)}"))
    key = Text(f"{'':<11}")
    for part, (colour, character) in STYLES.items():
        share = shown[chosen].parts[part] / shown[chosen].total_bytes
        percent = f"{100 * share:.0f}" if share >= 0.005 else "<1"
        key.append(character, style=colour).append(f" {part} {percent} %  ", style="dim")
    return [*lines, key]


def bar_cells(parts: Mapping[str, int], cells_per_byte: float) -> dict[str, int]:
    """Whole cells for each part whose sum is the rounded total: each part ends where its running sum does."""
    cells, end, running = {}, 0, 0
    for part, nbytes in parts.items():
        running += nbytes
        cells[part] = round(running * cells_per_byte) - end
        end += cells[part]
    return cells
