"""`minibble demo`, on a tiny random model in place of the built-in one."""

import pytest


@pytest.fixture
def builtin(monkeypatch, source, tmp_path):
    """Make the tiny checkpoint the built-in model."""
    import shutil

    from minibble.cli import demo
    from minibble.quantize import builtin

    folder = shutil.copytree(source, tmp_path / "demo")
    (folder / demo.HELD_OUT).write_text("Held out text, never seen. " * 100)
    monkeypatch.setattr(builtin, "demo_path", lambda: folder)
    monkeypatch.setattr(demo, "SEQ_LEN", 32)
    monkeypatch.setattr(demo, "WINDOWS", 2)
    return folder


def test_json(cli_json, builtin, tmp_path) -> None:
    out = tmp_path / "kept"
    tour = cli_json("demo", "--out", out, "--max-new-tokens", 3)
    assert set(tour) == {"out", "quantize", "verify", "report", "run", "evaluate", "elapsed_s"}
    assert tour["out"] == str(out)
    assert tour["verify"]["ok"]
    assert tour["report"]["total_bytes"] == tour["quantize"]["output_bytes"]
    assert [text["new_tokens"] for text in tour["run"]] == [3, 3, 3]
    assert tour["evaluate"]["tokens"] == 2 * 31
    assert (out / "minibble.json").exists()


def test_tour_leaves_nothing_behind(cli, builtin, tmp_path, monkeypatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    result = cli("demo", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.stderr
    for step in ("quantize", "verify", "report", "run", "evaluate"):
        assert f"minibble {step}" in result.stdout
    assert not list(scratch.iterdir())


def test_kept_folder_serves_again(cli_json, builtin, tmp_path) -> None:
    first, second = (cli_json("demo", "--out", tmp_path / "kept", "--max-new-tokens", 2) for _ in range(2))
    assert [tour["text"] for tour in first["run"]] == [tour["text"] for tour in second["run"]]


def test_folder_of_something_else_is_refused(cli, builtin, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    result = cli("demo", "--out", tmp_path / "mine")
    assert result.exit_code == 1
    assert "mine" in result.stderr
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
