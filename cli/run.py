"""`minibble run`: text from a checkpoint, streamed as it comes."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minibble.cli import run_stats
from minibble.cli.options import Count, devices_option, json_option, memory_options
from minibble.cli.output import ProgressLine, emit_json, note

if TYPE_CHECKING:
    from minibble.runtime.generation import GenerationResult, Sampling
    from minibble.runtime.plan import MemoryPlan
    from minibble.runtime.planning.placement import Placement

LEAVE = ("/exit", "/quit")


@click.command("run", short_help="Generate text from a checkpoint.")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--prompt", metavar="P", help="Text to continue; - reads it from standard input.")
@click.option("--chat", is_flag=True, help="Talk in the model's chat template, a line a turn; /exit ends.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N")
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 always takes the likeliest token; higher is more varied.",
)
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Sample from the likeliest P of the mass.",
)
@click.option("--top-k", metavar="K", type=click.IntRange(0), default=0, help="Sample from the K likeliest tokens.")
@click.option("--seed", metavar="S", type=int, help="Makes sampling repeatable.")
@memory_options
@devices_option
@click.option(
    "--context",
    type=Count(1),
    metavar="N",
    help="Tokens to plan memory for, such as 128k.  [default: prompt and new tokens; 4096 for a chat on GPUs]",
)
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("--stats", is_flag=True, help="Say on stderr how fast it was and what it took.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    checkpoint: str,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    gpu_memory: int | None,
    host_memory: int | None,
    offload_folder: Path | None,
    cpu_experts: bool,
    device: str | None,
    context: int | None,
    echo: bool,
    stats: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text from the checkpoint CKPT, 4-bit or 16-bit; `demo` is the tiny built-in model.

    The prompt comes from --prompt or from standard input. With --chat each line is a turn of a conversation.
    """
    if chat and prompt is not None:
        raise click.UsageError("give either --prompt or --chat", ctx)
    if not chat:
        prompt = _prompt(ctx, prompt)
    from minibble.runtime.generation import Sampling

    memory = {"gpu_memory": gpu_memory, "host_memory": host_memory, "offload_folder": offload_folder,
              "cpu_experts": cpu_experts}  # fmt: skip
    session = Session(checkpoint, memory, device, Sampling(**sampling), max_new_tokens, context, prompt)
    if chat:
        _chat(session, stats, as_json)
    else:
        _complete(session, prompt or "", echo, stats, as_json)


def _prompt(ctx: click.Context, prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        text = prompt
    elif prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give --prompt, --chat, or text on standard input", ctx)
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise click.UsageError("the prompt is empty", ctx)
    return text


class Session:
    """A loaded model and what it was asked for."""

    def __init__(
        self,
        checkpoint: str,
        memory: dict[str, Any],
        device: str | None,
        sampling: "Sampling",
        max_new_tokens: int,
        context: int | None,
        prompt: str | None,
    ):
        from minibble.runtime.loading import load

        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        started = time.perf_counter()
        reset_peaks()
        planned = context or max_new_tokens + _tokens_before(checkpoint, prompt, device)
        with ProgressLine("load") as line:
            self.model = load(checkpoint, device=device, context=planned, progress=line.update, **memory)
        self.load_s = time.perf_counter() - started

    def plan(self, tokens: int) -> "MemoryPlan | Placement":
        """What the model takes for a sequence of `tokens`; BudgetError if that is more than --gpu-memory."""
        plan = self.model.memory_plan(tokens)
        plan.check()
        return plan


def _tokens_before(checkpoint: str, prompt: str | None, device: str | None) -> int:
    """Tokens to plan for beside the first reply's: the prompt's, or those of a chat on GPUs, whose plan is for good."""
    from minibble.quantize.builtin import resolve_source
    from minibble.runtime.devices import the_devices
    from minibble.runtime.loading import DEFAULT_CONTEXT, load_tokenizer

    if prompt is None:
        return DEFAULT_CONTEXT if the_devices(device)[0].type == "cuda" else 0
    tokenizer = load_tokenizer(resolve_source(checkpoint))
    return 0 if tokenizer is None else len(tokenizer.encode(prompt))


def reset_peaks() -> None:
    """Start measuring the most memory taken on each GPU; where CUDA was not used yet, it is zero anyway."""
    import torch

    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_gpu_bytes() -> list[int]:
    """The most bytes allocated on each GPU; empty if none was used."""
    import torch

    if not torch.cuda.is_initialized():
        return []
    return [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]


def measured_json(model: Any) -> dict[str, Any]:
    """The most memory taken on each GPU, and what the experts did that are not all on one."""
    experts = [store.stats.to_json() for store in model.stores]
    return {"peak_gpu_bytes": peak_gpu_bytes(), **({"experts": experts} if experts else {})}


def _complete(session: Session, prompt: str, echo: bool, stats: bool, as_json: bool) -> None:
    from minibble.runtime.generation import encode, generate_text

    ids = encode(session.model, prompt)
    plan = session.plan(len(ids) + session.max_new_tokens)
    if echo and not as_json:
        _write(prompt)
    result = generate_text(
        session.model,
        ids,
        max_new_tokens=session.max_new_tokens,
        sampling=session.sampling,
        on_text=None if as_json else _write,
    )
    if as_json:
        emit_json({**result_json(result), **measured_json(session.model), "plan": plan.to_json()})
    else:
        _write("\n")
    if stats:
        _tell_stats(session, result, plan)


def _chat(session: Session, stats: bool, as_json: bool) -> None:
    from minibble.runtime.chat import Conversation

    conversation = Conversation(session.model, session.sampling, session.max_new_tokens)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        note("each line is a turn; /exit or Ctrl-D ends")
    turns: list[dict[str, Any]] = []
    plan = session.plan(session.max_new_tokens)
    while (line := _next_line("> " if terminal else "")) is not None:
        if not line.strip():
            continue
        plan = session.plan(conversation.tokens_with(line))
        result = conversation.reply(line, None if as_json else _write)
        turns.append({"user": line, **result_json(result)})
        if not as_json:
            _write("\n")
        if stats:
            _tell_stats(session, result, plan)
    if as_json:
        emit_json({"turns": turns, **measured_json(session.model), "plan": plan.to_json()})


def _next_line(prompt: str) -> str | None:
    """The next line of standard input; None at its end or when the user leaves."""
    if prompt:
        import readline  # noqa: F401  (line editing for input())

        try:
            line = input(prompt)
        except EOFError:
            _write("\n")
            return None
    else:
        line = sys.stdin.readline()
        if not line:
            return None
    line = line.rstrip("\n")
    return None if line.strip() in LEAVE else line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def result_json(result: "GenerationResult") -> dict[str, Any]:
    """Text and speed as plain data; speeds are null where there was nothing to measure."""
    return {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "decode_path": result.decode_path,
    }


def _tell_stats(session: Session, result: "GenerationResult", plan: "MemoryPlan | Placement") -> None:
    for line in run_stats.lines(session.model, session.load_s, result, plan):
        note(line)
