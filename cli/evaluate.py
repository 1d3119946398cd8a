"""`minibble evaluate`: how well a checkpoint predicts a text, and how far it is from its source."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minibble.cli.options import devices_option, json_option, memory_options
from minibble.cli.output import ProgressLine, duration, emit_json, show

if TYPE_CHECKING:
    from rich.table import Table

    from minibble.runtime.evaluate import Evaluation


@click.command("evaluate", short_help="Measure perplexity and the distance from the source.")
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--text",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    required=True,
    help="Text that the model has not been calibrated on.",
)
@click.option("--against", metavar="SOURCE", help="The 16-bit source, for KL divergence and top-1 agreement.")
@click.option(
    "--seq-len", metavar="T", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window."
)
@click.option("--windows", type=click.IntRange(1), metavar="N", help="Use the first N windows.  [default: all]")
@memory_options
@devices_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Arithmetic of the model.  [default: float32 on CPUs, bfloat16 on GPUs]",
)
@json_option
def command(
    checkpoint: str,
    text: Path,
    against: str | None,
    seq_len: int,
    windows: int | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    **memory: Any,
) -> None:
    """Measure the perplexity of the checkpoint CKPT on a text; with --against also its distance from the source.

    The distance is the mean Kullback-Leibler divergence of the next-token distributions, in nats per token, and
    how often both models hold the same token for the likeliest. CKPT may be `demo`.
    """
    result, elapsed_s = run_evaluation(checkpoint, text, against, seq_len, windows, device, dtype, **memory)
    if as_json:
        emit_json(evaluation_json(result, elapsed_s))
    else:
        show(evaluation_table(result, elapsed_s))


def run_evaluation(
    checkpoint: str | Path,
    text: Path,
    against: str | Path | None,
    seq_len: int,
    windows: int | None,
    device: str | None = None,
    dtype: str | None = None,
    **memory: Any,
) -> "tuple[Evaluation, float]":
    """`runtime.evaluate.evaluate` with progress on stderr, and the seconds it took."""
    import torch

    from minibble.runtime.evaluate import evaluate

    started = time.monotonic()
    with ProgressLine("evaluate", unit="windows") as line:
        result = evaluate(
            checkpoint,
            text,
            against,
            seq_len=seq_len,
            max_windows=windows,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            progress=line.update,
            **memory,
        )
    return result, time.monotonic() - started


def evaluation_json(result: "Evaluation", elapsed_s: float) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
        "source_perplexity": result.source_perplexity,
        "seconds": elapsed_s,
    }


def evaluation_table(result: "Evaluation", elapsed_s: float) -> "Table":
    """The figures as a small table."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("tokens", f"{result.tokens:,}", f"[dim]{duration(elapsed_s)}[/]")
    change = ""
    if result.source_perplexity is not None:
        change = f"source {result.source_perplexity:.3f}, {result.perplexity / result.source_perplexity - 1:+.2%}"
    table.add_row("perplexity", f"[bold]{result.perplexity:.3f}[/]", f"[dim]{change}[/]")
    if result.kl is not None and result.top1_agreement is not None:
        table.add_row("KL divergence", f"[bold]{result.kl:.5f}[/]", "[dim]nats per token, from the source[/]")
        table.add_row("same top token", f"[bold]{result.top1_agreement:.1%}[/]", "[dim]of positions[/]")
    return table
