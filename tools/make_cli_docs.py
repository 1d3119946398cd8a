"""Write docs/cli.md from the help of every command; `--check` only says whether it is up to date.

python tools/make_cli_docs.py [--check]
"""

import argparse
import sys
from pathlib import Path

import click

from minibble.cli.main import main as minibble

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100

HEAD = """# Command line

*Made by `python tools/make_cli_docs.py` from the help of the commands; do not edit.*

Results go to standard output, progress and messages to standard error. With `--json` a command prints exactly one
JSON object. It ends with 0 when it did what was asked, 1 when it failed (one line says why; `--debug` shows where),
2 when it was called wrongly and 130 when it was interrupted.
"""


def render() -> str:
    """The whole page; the same on every terminal."""
    commands = [(f"minibble {name}", command) for name, command in minibble.commands.items()]
    sections = [HEAD]
    for name, command in [("minibble", minibble), *commands]:
        sections.append(f"## {name}\n\n```\n{help_text(name, command)}\n```\n")
    return "\n".join(sections)


def help_text(name: str, command: click.Command) -> str:
    """The help of `command` as on a terminal of WIDTH columns."""
    settings = {**command.context_settings, "help_option_names": ["-h", "--help"]}
    settings |= {"terminal_width": WIDTH, "max_content_width": WIDTH}
    with click.Context(command, info_name=name, **settings) as context:
        lines = command.get_help(context).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def run() -> int:
    """Write the page, or with `--check` compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="end with 1 if docs/cli.md is not up to date")
    text = render()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is out of date: run python tools/make_cli_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run())
