"""`minibble demo`: the built-in model through quantize, verify, report, run and evaluate."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from minibble.cli.evaluate import evaluation_json, evaluation_table, run_evaluation
from minibble.cli.options import json_option
from minibble.cli.output import ProgressLine, console, duration, emit_json
from minibble.cli.quantize import result_json
from minibble.cli.report import show_report
from minibble.cli.run import result_json as text_json
from minibble.cli.verify import verify_json

PROMPTS = ("This module provides", "If the argument is None,", "Raises ValueError if")
TEMPERATURE, TOP_K, SEED = 0.7, 40, 1
SEQ_LEN, WINDOWS = 256, 8
HELD_OUT = "heldout.txt"


@click.command("demo", short_help="Take the tiny built-in model all the way.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the 4-bit model in this folder, and take it from there the next time.  [default: a temporary one]",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True, metavar="N")
@json_option
def command(out: Path | None, max_new_tokens: int, as_json: bool) -> None:
    """Take the tiny built-in model all the way: quantize, verify, report, run, evaluate.

    It was trained on Python's own documentation, so its text looks like Python and says nothing.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        folder = out
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minibble-demo-"))) / "nf4"
        tour = _tour(folder, max_new_tokens, quiet=as_json)
    result = {"out": out, **tour, "elapsed_s": time.monotonic() - started}
    if as_json:
        emit_json(result)
    else:
        console().print(f"\n[dim]{duration(result['elapsed_s'])} in all[/]")


def _tour(out: Path, max_new_tokens: int, quiet: bool) -> dict[str, Any]:
    from rich.markup import escape

    from minibble.quantize.builtin import DEMO, demo_path
    from minibble.quantize.errors import CheckpointError
    from minibble.quantize.job import quantize_checkpoint
    from minibble.quantize.verify import verify_checkpoint
    from minibble.runtime.report import memory_report

    screen = console()
    screen.quiet = quiet
    name = escape(str(out))

    screen.print(f"[bold]minibble quantize {DEMO} {name}[/]")
    with ProgressLine("quantize") as line:
        job = quantize_checkpoint(
            DEMO, out, resume=True, progress=lambda p: line.update(p.done_bytes, p.total_bytes, p.current)
        )
    screen.print(f"  {job.plan.quantized_tensors} matrices 4-bit in {job.elapsed_s:.1f} s\n")

    screen.print(f"[bold]minibble verify {name} --against {DEMO}[/]")
    verified = verify_checkpoint(out, against=demo_path())
    if not verified.ok:
        raise CheckpointError(f"{out}: {verified.problems[0]}")
    screen.print(f"  {verified.tensors} tensors, no problems\n")

    report = memory_report(out)
    screen.print(f"[bold]minibble report {name}[/]")
    if not quiet:
        show_report(report)

    screen.print(f"\n[bold]minibble run {name}[/]")
    texts = _write_texts(out, max_new_tokens, screen)

    screen.print(f"[bold]minibble evaluate {name} --against {DEMO}[/]")
    evaluation, elapsed_s = run_evaluation(out, demo_path() / HELD_OUT, demo_path(), SEQ_LEN, WINDOWS)
    screen.print(evaluation_table(evaluation, elapsed_s))
    return {
        "quantize": result_json(job),
        "verify": verify_json(verified),
        "report": report.to_json(),
        "run": texts,
        "evaluate": evaluation_json(evaluation, elapsed_s),
    }


def _write_texts(out: Path, max_new_tokens: int, screen: Any) -> list[dict[str, Any]]:
    from rich.text import Text

    from minibble.runtime.generation import Sampling, encode, generate_text
    from minibble.runtime.loading import load

    model = load(out)
    sampling = Sampling(TEMPERATURE, top_k=TOP_K, seed=SEED)
    texts = []
    for prompt in PROMPTS:
        result = generate_text(model, encode(model, prompt), max_new_tokens=max_new_tokens, sampling=sampling)
        texts.append({"prompt": prompt, **text_json(result)})
        speed = f"{result.decode_tokens_per_s:.0f} tokens/s" if result.decode_tokens_per_s else ""
        screen.print(Text.assemble((prompt, "bold cyan"), result.text.rstrip(), (f"  {speed}\n", "dim")))
    return texts
