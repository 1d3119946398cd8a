"""Options that several commands share, and the parameter types for sizes and counts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from minibble.quantize.errors import ConfigError
from minibble.quantize.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])

DEBUG = "minibble.debug"


class Size(click.ParamType):
    """Bytes, written 228GB (1e9) or 228GiB (2**30)."""

    name = "size"

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            nbytes = parse_size(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        if nbytes < self.least:
            self.fail(f"'{value}' is not a size above zero", param, ctx)
        return nbytes


SIZE = Size()
SIZE_OR_NOTHING = Size(least=0)


class Count(click.ParamType):
    """A whole number of at least `least`, written 8192, 8k, 1M (powers of 1000) or 8Ki (powers of 1024)."""

    name = "count"
    _scales: ClassVar = {"": 1, "k": 1000, "m": 1000**2, "ki": 1024, "mi": 1024**2}

    def __init__(self, least: int = 0):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d+)\s*([kKmM]i?)?\s*", str(value), re.ASCII)
        if match is None:
            self.fail(f"'{value}' is not a whole number such as 8192, 8k, 128K or 1M", param, ctx)
        number = int(match[1]) * self._scales[(match[2] or "").lower()]
        if number < self.least:
            self.fail(f"{number} is not in the range x>={self.least}.", param, ctx)
        return number


COUNT = Count()


class Gpus(click.ParamType):
    """Sizes of GPUs in bytes, written 141GB, 2x141GB or 80GB,141GB."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        from minibble.runtime.planning.machine import gpu_sizes

        if isinstance(value, tuple):
            return value
        try:
            return gpu_sizes(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


GPUS = Gpus()


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


# None means the best that there is.
device_option = click.option(
    "--device",
    metavar="D",
    help="Device to work on, such as cpu, cuda or cuda:1.  [default: a GPU if there is one]",
)
devices_option = click.option(
    "--device",
    metavar="D[,D...]",
    help="Device to run on, cpu or cuda:1; several GPUs share the layers.  [default: a GPU if there is one]",
)


def memory_options(command: F) -> F:
    """What a model may take on GPUs and in host memory, and what is done with the rest."""
    options = (
        click.option(
            "--gpu-memory", type=SIZE, metavar="SIZE", help="Most memory to take on all GPUs.  [default: what is free]"
        ),
        click.option(
            "--host-memory",
            type=SIZE_OR_NOTHING,
            metavar="SIZE",
            help="Most host memory to pin for experts that do not fit.  [default: what is free]",
        ),
        click.option(
            "--offload-folder",
            type=click.Path(file_okay=False, exists=True, path_type=Path),
            metavar="DIR",
            help="Folder for experts that fit neither there; they are read from it again and again.",
        ),
        click.option(
            "--cpu-experts",
            is_flag=True,
            help="Let the CPU compute a part of each missing expert of decode steps while the GPU reads the rest.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
