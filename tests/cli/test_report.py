"""`minibble report` as JSON, table and page."""

import json
import re
from html.parser import HTMLParser

import pytest
from safetensors.torch import load_file

from minibble.cli.report import bar_cells, count
from minibble.cli.report_html import page
from minibble.runtime.report import memory_report


def test_json_of_the_released_model(cli_json) -> None:
    report = cli_json("report", "minimax-text-01", "--context", 1, "--batch", 2)
    assert report["parameters"] == 456_089_655_296
    assert round(report["total_bytes"] / 1e9, 1) == 239.0
    assert round(report["bits_per_weight"], 3) == 4.192
    assert report["kv_cache_bytes"] == 2 * 40_960
    assert report["state_bytes"] == 2 * 293_601_280
    assert set(report["parts"]) == {"experts", "attention", "embeddings", "other"}
    assert (report["context"], report["batch"], report["target"]) == (1, 2, "minimax-text-01")


def test_table_has_both_units_side_by_side(cli) -> None:
    result = cli("report", "minimax-text-01")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert re.search(r"GB +GiB +GB +GiB", result.stdout)
    assert re.search(r"total +912\.18 +849\.53 +260\.11 +242\.25 +238\.97 +222\.56 +235\.32 +219\.16", result.stdout)
    assert re.search(r"experts +869\.73", result.stdout)
    assert "456.09 B parameters, 45.94 B active per token" in result.stdout
    assert "70 lightning and 10 softmax layers, 32 experts each, 2 per token" in result.stdout
    assert "KV cache 335.5 MB + state 293.6 MB = 239.6 GB" in result.stdout


@pytest.mark.parametrize(
    ("width", "options", "names"),
    [
        (100, (), "bf16 nf4 nf4-dq nf4-dq-all int4-g128"),
        (80, (), "bf16 nf4-dq nf4-dq-all int4-g128"),
        (80, ("--format", "nf4"), "bf16 nf4 nf4-dq int4-g128"),
        (60, (), "bf16 nf4-dq int4-g128"),
    ],
)
def test_a_narrow_terminal_goes_without_some_formats(cli, monkeypatch, width: int, options, names: str) -> None:
    monkeypatch.setattr("minibble.cli.output.PIPE_WIDTH", width)
    result = cli("report", "minimax-text-01", *options)
    assert result.exit_code == 0
    heads = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["bf16"]]
    assert heads[0] == names.split()
    table = [line for line in result.stdout.splitlines() if re.match(r" (experts|total|bits|embeddings)", line)]
    assert len(table) == 4 and max(map(len, table)) <= width


def test_int4_on_disk(cli, cli_json, source, make_int4, tmp_path, monkeypatch) -> None:
    folder = make_int4(source, tmp_path / "q", 64)
    report = cli_json("report", folder)
    assert report["format"] == "int4-g64"
    assert report["total_bytes"] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr("minibble.cli.output.PIPE_WIDTH", 80)
    assert "int4-g64 on disk" in cli("report", folder).stdout


def test_table_fits_the_terminal(cli, quantized, monkeypatch) -> None:
    for width in (80, 100):
        monkeypatch.setattr("minibble.cli.output.PIPE_WIDTH", width)
        result = cli("report", quantized)
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= width
        assert "…" not in result.stdout
        assert "on disk" in result.stdout


def test_checkpoint_is_reported_as_it_lies_on_disk(cli_json, source, quantized) -> None:
    on_disk, asked = cli_json("report", quantized), cli_json("report", source, "--format", "nf4-dq")
    assert on_disk["stored"]
    assert not asked["stored"]
    assert on_disk["parts"] == asked["parts"]
    assert on_disk["format"] == asked["format"] == "nf4-dq"


def test_bars_add_up() -> None:
    parts = {"experts": 333, "attention": 333, "embeddings": 333, "other": 1}
    for room in range(1, 60):
        cells = bar_cells(parts, room / 1000)
        assert sum(cells.values()) == room
        assert all(abs(cells[part] - parts[part] * room / 1000) <= 1 for part in parts)


@pytest.mark.parametrize(("number", "text"), [(456.0e9, "456.00 B"), (2.5e6, "2.50 M"), (1234, "1.23 k"), (7, "7")])
def test_count(number: float, text: str) -> None:
    assert count(number) == text


class Page(HTMLParser):
    """Collects the tags of a page and checks that they close in order."""

    void = ("meta", "rect", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_self_contained(cli, tmp_path) -> None:
    file = tmp_path / "report.html"
    result = cli("report", "minimax-text-01", "--html", file, "--context", 100_000)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"minibble: wrote {file}\n")
    text = file.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img", text)
    assert not [attrs for _, attrs in parsed.tags if "src" in attrs or "href" in attrs]
    assert "238.97" in text
    assert "222.56" in text
    assert "100,000 tokens" in text
    assert sum(tag == "rect" for tag, _ in parsed.tags) == 5 * 4 + 3 + 80


def test_page_escapes_what_it_is_told(tmp_path, tiny_config) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)> & co"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    text = page(memory_report(folder))
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; co" in text


def test_names_are_no_markup(cli, tmp_path, tiny_config) -> None:
    folder = tmp_path / "[bold]x[bold]"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    assert "[bold]x[bold]" in cli("report", folder).stdout


def test_json_and_page_at_once(cli_json, tmp_path) -> None:
    file = tmp_path / "report.html"
    assert cli_json("report", "minimax-m1", "--html", file)["format"] == "nf4-dq"
    assert file.exists()


def test_plan_for_gpus(cli, cli_json) -> None:
    options = ("--gpu-memory", "228GB", "--gpus", "2x141GB", "--context", "1M")
    report = cli_json("report", "minimax-text-01", *options)
    assert report["context"] == 1_000_000
    assert [device["layers"] for device in report["devices"]][1][1] == 80
    assert sum(device["total_bytes"] for device in report["devices"]) <= 228e9
    assert 0 < report["expected_hit_rate"] < 1
    result = cli("report", "minimax-text-01", *options)
    for device in report["devices"]:
        first, stop = device["layers"]
        row = next(line for line in result.stdout.splitlines() if device["device"] in line)
        assert f"{first}-{stop - 1}" in row and f"{device['experts']:,} (" in row
        assert f"{device['total_bytes'] / 1e9:.2f}" in row
    pinned = report["experts"]["pinned"]
    assert f"host memory: {pinned:,} experts, {report['host_bytes'] / 1e9:.1f} GB" in result.stdout
    assert f"{100 * report['expected_hit_rate']:.1f} % of the experts' work" in result.stdout
    assert "disk:" not in result.stdout


def test_plan_fits_a_terminal(cli, monkeypatch) -> None:
    monkeypatch.setattr("minibble.cli.output.PIPE_WIDTH", 80)
    options = ("--gpus", "24GB,2x141GB", "--context", "1M", "--batch", 2, "--host-memory", "20GB", "--disk", "300GB")
    result = cli("report", "minimax-text-01", *options)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("GPU")) :]
    assert max(map(len, table[:8])) <= 80 and "…" not in "".join(table[:8])
    assert any(line.startswith("disk: ") for line in table)


def test_plan_that_does_not_fit_is_one_line(cli) -> None:
    result = cli("report", "minimax-text-01", "--gpu-memory", "12GB")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("minibble: error: cuda:0 needs 17.5 GB without any resident expert")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("8k", 8000), ("128K", 128_000), ("1M", 1_000_000), ("1Mi", 2**20), ("0", 0)]
)
def test_context_in_thousands(cli_json, text: str, tokens: int) -> None:
    assert cli_json("report", "minimax-text-01", "--context", text)["context"] == tokens


@pytest.mark.parametrize(
    ("option", "value"),
    [("--context", "-1"), ("--context", "1.5k"), ("--context", "8kB"), ("--gpus", "2x"), ("--gpus", "0x80GB")],
)
def test_what_is_no_count_or_gpu_is_wrong_usage(cli, option: str, value: str) -> None:
    result = cli("report", "minimax-text-01", option, value)
    assert result.exit_code == 2
    assert value in result.stderr or "N" in result.stderr


def test_plan_in_the_page(cli, tmp_path) -> None:
    page = tmp_path / "report.html"
    options = ("--gpus", "2x141GB", "--gpu-memory", "228GB", "--html", page)
    assert cli("report", "minimax-text-01", *options).exit_code == 0
    text = page.read_text()
    assert "On these GPUs" in text and "<td>cuda:1</td>" in text and "host memory: 162 experts" in text
    assert cli("report", "minimax-text-01", "--html", page).exit_code == 0
    assert "On these GPUs" not in page.read_text()
