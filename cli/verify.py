"""`minibble verify`: is a checkpoint whole, and does it stand for its source."""

from typing import TYPE_CHECKING, Any

import click

from minibble.cli.options import json_option
from minibble.cli.output import ProgressLine, emit_json, show

if TYPE_CHECKING:
    from minibble.quantize.verify import VerifyResult

SHOWN = 20


@click.command("verify", short_help="Check that a checkpoint is whole.")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--against", metavar="SOURCE", help="The 16-bit source: also bound each matrix's error.")
@json_option
@click.pass_context
def command(ctx: click.Context, checkpoint: str, against: str | None, as_json: bool) -> None:
    """Check the checkpoint CKPT: every tensor there, of the right shape, finite, and its files unchanged.

    Ends with 1 if anything is wrong.
    """
    from minibble.quantize.verify import verify_checkpoint

    with ProgressLine("verify") as line:
        result = verify_checkpoint(
            checkpoint, against=against, progress=lambda p: line.update(p.done_bytes, p.total_bytes, p.current)
        )
    if as_json:
        emit_json(verify_json(result))
    else:
        show(*_lines(checkpoint, result))
    if not result.ok:
        ctx.exit(1)


def verify_json(result: "VerifyResult") -> dict[str, Any]:
    """The outcome as plain data."""
    return {"ok": result.ok, "tensors": result.tensors, "problems": result.problems, "notes": result.notes}


def _lines(checkpoint: str, result: "VerifyResult") -> list[str]:
    from rich.markup import escape

    notes = [f"[dim]· {escape(note)}[/]" for note in result.notes]
    if result.ok:
        return [f"[green]✓[/] {escape(checkpoint)}: {result.tensors:,} tensors, no problems", *notes]
    found = len(result.problems)
    lines = [
        f"[red]✗[/] {escape(checkpoint)}: {found:,} problem{'s' if found > 1 else ''}",
        *(f"  {escape(problem)}" for problem in result.problems[:SHOWN]),
    ]
    if found > SHOWN:
        lines.append(f"  and {found - SHOWN:,} more (--json lists all)")
    return [*lines, *notes]
