"""What every command has in common: help, exit codes, one line for an error, nothing else on stdout."""

import io
import subprocess
import sys

import pytest

from minibble.cli.main import main
from minibble.cli.output import ProgressLine, duration, emit_json
from minibble.quantize.errors import CheckpointError

COMMANDS = ["quantize", "run", "report", "evaluate", "verify", "bench", "doctor", "demo"]


def one_line_error(result) -> str:
    """The message of a failed command, which must be all that it said."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("minibble: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def failing(monkeypatch):
    """Make `minibble report` raise what it is given."""
    import minibble.runtime.report

    def fail_with(error: BaseException) -> None:
        def memory_report(*args, **kwargs):
            raise error

        monkeypatch.setattr(minibble.runtime.report, "memory_report", memory_report)

    return fail_with


def test_commands_are_listed_in_the_order_of_use(cli) -> None:
    assert list(main.commands) == COMMANDS
    result = cli("--help")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.split("Commands:\n")[1].splitlines()[: len(COMMANDS)]] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_json_and_debug(cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in ("--json", "--debug", "--help"))


def test_version(cli) -> None:
    import minibble

    assert cli("--version").stdout == f"minibble {minibble.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from minibble.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'bitsandbytes', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "error",
    [CheckpointError("tensor x is missing;\n  download it again"), FileNotFoundError(2, "No such file", "x")],
)
def test_expected_failures_are_one_line(cli, failing, error) -> None:
    failing(error)
    message = one_line_error(cli("report", "minimax-m1", "--json"))
    assert "x" in message
    assert "--debug" not in message


def test_unexpected_failures_name_the_remedy(cli, failing) -> None:
    failing(ZeroDivisionError("division by zero"))
    message = one_line_error(cli("report", "minimax-m1"))
    assert "ZeroDivisionError: division by zero (run again with --debug for the traceback)" in message


@pytest.mark.parametrize("args", [("--debug", "report", "demo"), ("report", "demo", "--debug")])
def test_debug_shows_the_traceback(cli, failing, args) -> None:
    failing(CheckpointError("broken"))
    result = cli(*args)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("minibble: error: broken\n")


def test_interruption(cli, failing) -> None:
    failing(KeyboardInterrupt())
    result = cli("report", "minimax-m1")
    assert (result.exit_code, result.stderr) == (130, "minibble: interrupted\n")


@pytest.mark.parametrize(
    "args",
    [
        ("report",),
        ("nonsense",),
        ("quantize", "demo", "out", "--shard-size", "5 apples"),
        ("quantize", "demo", "out", "--shard-size", "0GB"),
        ("quantize", "demo", "out", "--method", "int3"),
        ("run", "demo", "--gpu-memory", "lots", "--prompt", "x"),
        ("run", "demo", "--prompt", "x", "--chat"),
        ("run", "demo", "--prompt", "   "),
        ("run", "demo", "--prompt", "x", "--top-p", "0"),
        ("evaluate", "demo"),
        ("report", "demo", "--batch", "0"),
    ],
)
def test_wrong_calls_end_with_2(cli, args) -> None:
    result = cli(*args, input="")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("report", "/nowhere/at-all"),
        ("report", "minimax-text-02"),
        ("quantize", "/nowhere/at-all", "out"),
        ("run", "/nowhere/at-all", "--prompt", "x"),
        ("evaluate", "/nowhere/at-all", "--text", __file__),
        ("report", "minimax-m1", "--html", "/nowhere/at-all.html"),
    ],
)
def test_what_is_not_there(cli, args) -> None:
    assert "nowhere" in one_line_error(cli(*args)) or "minimax-text-02" in args


def test_json_has_no_nan(capsys) -> None:
    emit_json({"perplexity": float("nan"), "values": (1.5, float("inf"))})
    assert capsys.readouterr().out.split() == [
        "{",
        '"perplexity":',
        "null,",
        '"values":',
        "[",
        "1.5,",
        "null",
        "]",
        "}",
    ]


def test_progress_in_plain_lines(capsys) -> None:
    with ProgressLine("quantize", interval_s=0) as line:
        line.update(10e9, 912e9, "a")
        line.update(912e9, 912e9, "b")
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first.startswith("minibble: quantize: 10.0 GB of 912.0 GB (1 %)")
    assert last.startswith("minibble: quantize: 912.0 GB of 912.0 GB (100 %), ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    with ProgressLine("quantize") as line:
        line.update(1e9, 4e9, "model.layers.3.block_sparse_moe.experts.7.w1.weight")
    assert "1.0/4.0 GB" in sys.stderr.getvalue()
    assert "layers.3.experts.7.w1" in sys.stderr.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3:05 min"), (7800, "2:10 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
