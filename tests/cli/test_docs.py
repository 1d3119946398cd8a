"""docs/cli.md is what the commands say of themselves."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("make_cli_docs", ROOT / "tools" / "make_cli_docs.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_page_is_up_to_date() -> None:
    tool = load_tool()
    assert tool.render() == tool.TARGET.read_text(encoding="utf-8"), "run python tools/make_cli_docs.py"


def test_page_does_not_depend_on_the_terminal(monkeypatch) -> None:
    tool = load_tool()
    text = tool.render()
    monkeypatch.setenv("COLUMNS", "40")
    assert tool.render() == text
    assert max(map(len, text.splitlines())) <= 120


def test_check_says_so(monkeypatch, tmp_path, capsys) -> None:
    tool = load_tool()
    monkeypatch.setattr(tool, "TARGET", tmp_path / "cli.md")
    monkeypatch.setattr("sys.argv", ["make_cli_docs.py", "--check"])
    assert tool.run() == 1
    assert "out of date" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["make_cli_docs.py"])
    assert tool.run() == 0
    monkeypatch.setattr("sys.argv", ["make_cli_docs.py", "--check"])
    assert tool.run() == 0
