"""What `make interop` compares and how it ends, without environments or a network; bitsandbytes is read in earnest."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibble.calibrate.job import quantize

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[SimpleNamespace]:
    """The three modules of `make interop`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import interop
        import interop_check
        import interop_environments

        yield SimpleNamespace(driver=interop, check=interop_check, environments=interop_environments)
    for name in ("interop", "interop_check", "interop_environments"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22]), 1),
        (torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]), 0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.0]), 1),
        (torch.ones(2, 3), torch.ones(3, 2), 6),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float16), 6),
        (torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).t().contiguous().t(), 0),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16), 1),
    ],
)
def test_differing_counts_bits(tool, ours, theirs, count) -> None:
    assert tool.check.differing(ours, theirs) == count


def test_every_matrix_is_asked_for(tool) -> None:
    way = tool.check.Way("it", torch.float32, lambda name: torch.ones(2, 2))
    reference = {"a": torch.ones(2, 2), "b": torch.ones(2, 2), "c": torch.full((2, 2), 2.0)}
    read = tool.check.read_matrices(way, ["a", "c", "d"], reference)
    assert read.differ == {"d": "in the files only", "b": "not in the files", "c": "4 of 4 weights"}
    assert read.compared == 4


def test_settings_are_those_that_both_know(tool) -> None:
    read = tool.check.read_settings(
        "it", "file", {"bits": 4, "sym": True, "new": 1}, {"bits": 4, "sym": False, "old": 0}
    )
    assert (read.compared, read.differ) == (2, {"sym": "True became False"})


def test_bitsandbytes_reads_what_is_written_and_damage_shows(tool, make_source, tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the judge, is missing")
    files = tmp_path / "files"
    quantize(make_source(tmp_path / "source"), files)
    tool.driver.write_references(files, tmp_path)
    reads = list(tool.check.reads_of("bitsandbytes", files, tmp_path))
    assert [read.by for read in reads] == [
        "transformers' BitsAndBytesConfig",
        *["dequantize_4bit"] * 3,
        *["Linear4bit"] * 3,
    ]
    assert all(read.compared and not read.differ for read in reads)

    name = min(load_file(tmp_path / "float32.safetensors"))
    shard = next(path for path in files.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][3] ^= 0x10
    save_file(tensors, shard)
    reads = list(tool.check.reads_of("bitsandbytes", files, tmp_path))
    assert all(list(read.differ) == [name] for read in reads[1:])
    assert {read.differ[name].split(" of ")[0] for read in reads[1:]} == {"1"}


@pytest.mark.parametrize(
    ("differs", "skipped", "status", "says"),
    [
        ([{}, {}], {}, 0, "all 2 comparisons are equal to the bit, by a 1"),
        ([{}], {"b 2": "does not install: no wheel"}, 0, "skipped: b 2: does not install: no wheel"),
        ([{}, {"x.weight": "1 of 9 weights"}], {}, 1, "1 of 2 comparisons are not equal"),
        ([], {"a 1": "why", "b 2": "why"}, 1, "no tool ran"),
    ],
)
def test_how_it_ends(tool, capsys, differs, skipped, status, says) -> None:
    rows = [tool.driver.Row("a 1", "module", "nf4", "float32", 9, differ) for differ in differs]
    assert tool.driver.report(rows, skipped) == status
    assert says in capsys.readouterr().out


def test_nothing_compared_is_not_equal(tool) -> None:
    row = tool.driver.Row("a 1", "module", "nf4", "float32", 0, {})
    assert tool.driver.report([row], {}) == 1


@pytest.mark.parametrize(
    ("lines", "late", "why"),
    [
        (["Collecting x", "ERROR: No matching distribution", "ERROR: more"], False, "No matching distribution"),
        (["gcc: not found", ""], False, "gcc: not found"),
        ([], False, "nothing said"),
        (["ERROR: x"], True, "not installed within 60 s"),
    ],
)
def test_why_a_tool_is_skipped(tool, lines, late, why) -> None:
    assert why in tool.environments.reason(lines, 60, late)


def test_an_environment_is_made_once_and_again_when_pins_change(tool, monkeypatch, tmp_path) -> None:
    commands: list[list[str]] = []

    def run(command, limit_s, environ, log) -> bool:
        commands.append(command)
        (tmp_path / "x" / "bin").mkdir(parents=True, exist_ok=True)
        return "x==3" not in command

    monkeypatch.setattr(tool.environments, "_run", run)
    made = tool.environments.Tool("x", "1", ("nf4",), ("y==2",), environ={"A": "1"})
    python = tool.environments.ensure(made, tmp_path, "9.9", 60)
    assert python == tmp_path / "x" / "bin" / "python"
    assert {"torch==9.9", "x==1", "y==2"} <= set(commands[-1])
    count = len(commands)
    tool.environments.ensure(made, tmp_path, "9.9", 60)
    assert len(commands) == count
    tool.environments.ensure(made, tmp_path, "9.10", 60)
    assert len(commands) == 2 * count
    bad = tool.environments.Tool("x", "3", ("nf4",), ())
    for _ in range(2):  # a failure is not taken for an environment
        with pytest.raises(tool.environments.SkippedError, match="does not install"):
            tool.environments.ensure(bad, tmp_path, "9.9", 60)
    assert len(commands) == 4 * count


def test_what_is_late_is_ended(tool, tmp_path) -> None:
    with (tmp_path / "log").open("w+") as log:
        assert not tool.environments._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5, {}, log)
        assert tool.environments._run([sys.executable, "-c", "pass"], 60, {}, log)
