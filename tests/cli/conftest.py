"""The command line in-process, and tiny checkpoints for it to work on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from minibble.cli.main import main

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """`cli("report", path, ...)`: the finished command, with exit_code, stdout and stderr."""

    def invoke(*args: Any, input: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], input=input)

    return invoke


@pytest.fixture(scope="session")
def cli_json(cli) -> Callable[..., dict[str, Any]]:
    """`cli_json(...)`: the object that a successful command with --json prints, and nothing else."""

    def invoke(*args: Any, input: str | None = None) -> dict[str, Any]:
        result = cli(*args, "--json", input=input)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return invoke


@pytest.fixture(scope="session")
def source(tmp_path_factory, make_source, tiny_config) -> Path:
    """A tiny 16-bit checkpoint that speaks bytes."""
    from golden.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer

    config = tiny_config("hf", vocab_size=VOCAB_SIZE, eos_token_id=0, bos_token_id=None, pad_token_id=1)
    folder = make_source(tmp_path_factory.mktemp("cli") / "source", config)
    (folder / "generation_config.json").unlink()
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(source) -> Path:
    """`source` in 4 bit."""
    from minibble.quantize.job import quantize_checkpoint

    out = source.parent / "quantized"
    quantize_checkpoint(source, out)
    return out
