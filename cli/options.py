"""Options that several commands share, and the parameter type for sizes."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from minibble.quantize.errors import ConfigError
from minibble.quantize.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])

DEBUG = "minibble.debug"


class Size(click.ParamType):
    """Bytes, written 228GB (1e9) or 228GiB (2**30)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            nbytes = parse_size(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        if nbytes <= 0:
            self.fail(f"'{value}' is not a size above zero", param, ctx)
        return nbytes


SIZE = Size()


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


def debug_option(command: F) -> F:
    """`--debug`, the same before and after the name of the command."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show the traceback when something fails.",
    )(command)


def json_option(command: F) -> F:
    """`--json` (as `as_json`) and `--debug`, which every command has."""
    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
    return option(debug_option(command))


def device_option(command: F) -> F:
    """`--device`, None meaning the best that there is."""
    return click.option(
        "--device",
        metavar="D",
        help="Device to work on, such as cpu, cuda or cuda:1.  [default: a GPU if there is one]",
    )(command)
