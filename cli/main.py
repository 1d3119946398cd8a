"""`minibble`: the group of all commands, and what happens when one fails."""

import errno
import logging
import sys
import traceback

import click

from minibble import __version__
from minibble.cli import bench, demo, doctor, evaluate, quantize, report, run, verify
from minibble.cli.options import DEBUG, debug_option
from minibble.cli.output import describe, note
from minibble.quantize.errors import MinibbleError

FAILED, INTERRUPTED = 1, 130


class Commands(click.Group):
    """The group of commands: lists them in the order of use, and turns failures into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as error:
            _tell(ctx, error, "interrupted")
            ctx.exit(INTERRUPTED)
        except (MinibbleError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly when the reader of our output is gone
            _tell(ctx, error, f"error: {describe(error)}")
            ctx.exit(FAILED)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, and torch may not have been imported
                remedy = "allow less with --gpu-memory, plan for less --context, or end what else uses the GPU"
                _tell(ctx, error, f"error: out of GPU memory ({describe(error)}); {remedy}")
                ctx.exit(FAILED)
            hint = "run again with --debug for the traceback"
            _tell(ctx, error, f"error: {type(error).__name__}: {describe(error)} ({hint})")
            ctx.exit(FAILED)


def _tell(ctx: click.Context, error: BaseException, message: str) -> None:
    if ctx.meta.get(DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    note(message)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Sizes are written 228GB (1e9) or 228GiB (2^30). Every command has --json and --help.",
)
@click.version_option(__version__, prog_name="minibble", message="%(prog)s %(version)s")
@debug_option
def main() -> None:
    """4-bit MiniMax-Text-01 and M1: quantize, measure and run 456 B parameters in a chosen amount of memory."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="minibble: %(levelname)s: %(message)s")
    logging.getLogger("minibble.runtime.kernels.nvrtc").setLevel(logging.INFO)  # compiling takes seconds: say so


for _module in (quantize, run, report, evaluate, verify, bench, doctor, demo):
    main.add_command(_module.command)


if __name__ == "__main__":
    main(prog_name="minibble")
