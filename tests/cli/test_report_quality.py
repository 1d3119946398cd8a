"""Quality in the report: heat maps in the page, lines on the terminal, colour scales."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from golden.calibrated_manifest import calibrate_folder, calibrated
from hypothesis import given
from hypothesis import strategies as st

from minibble.cli.heatmap import ERROR_STEPS, RAMPS, SHARE_STEPS, LogScale, luminance, ramp_style, share_step, spread
from minibble.cli.report_html import page
from minibble.cli.report_quality import figure, sections, summary
from minibble.quantize.builtin import builtin_config
from minibble.quantize.job import quantize_checkpoint
from minibble.runtime.quality import Quality, read_quality
from minibble.runtime.report import memory_report

# Layers 0 to 6 of the built-in model are lightning, 7 is softmax; 5 experts in each.
DEMO_CELLS = 7 * 3 + 4 + 8 * 3


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The built-in model, rounded to nearest."""
    quantize_checkpoint("demo", tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture
def calibrated_checkpoint(checkpoint: Path) -> Path:
    """The built-in model with the manifest of a calibrated one."""
    calibrate_folder(checkpoint)
    return checkpoint


def change(folder: Path, **keys: Any) -> None:
    """Replace keys of a folder's manifest."""
    file = folder / "minibble.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def quality_of(folder: Path) -> Quality:
    quality = memory_report(folder).quality
    assert quality is not None
    return quality


class Drawing(HTMLParser):
    """The maps of a page by their label: (colour class, tooltip, position) of each cell, and how many of each mark."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.cells: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {}
        self.marks: dict[str, list[str]] = {}
        self.map = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = {key: value or "" for key, value in attrs}
        if tag == "meta":
            return
        self.open.append((tag, given.get("class", "")))
        if tag == "svg" and "cells" in given.get("class", ""):
            self.map = given["aria-label"]
            self.cells[self.map], self.marks[self.map] = [], []
        inside = any(name == "svg" and style == "cells" for name, style in self.open)
        if inside and tag in ("rect", "circle") and given.get("class") in ("mark", "dot"):
            self.marks[self.map].append(given["class"])
        elif inside and tag == "rect":
            colour, tip, _ = self.cells[self.map][-1]
            place = tuple(given[key] for key in ("x", "y", "width", "height"))
            self.cells[self.map][-1] = (colour, tip, place)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if [name for name, _ in self.open[-2:]] == ["g", "title"]:
            self.cells[self.map].append((self.open[-2][1], data, ()))


def test_page_of_a_rounded_checkpoint(cli, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert cli("report", checkpoint, "--html", file).exit_code == 0
    text = file.read_text(encoding="utf-8")
    drawing = Drawing(text)
    assert list(drawing.cells) == ["Mean relative error by layer and matrix"]
    (cells,) = drawing.cells.values()
    assert len(cells) == DEMO_CELLS
    assert any(re.fullmatch(r"layer 7, q_proj: relative error 0\.008\d\d", tip) for _, tip, _ in cells)
    pattern = r"layer 3, w2: relative error 0\.008\d\d, mean of 5 experts; largest 0\.008\d\d, expert \d"
    assert any(re.fullmatch(pattern, tip) for _, tip, _ in cells)
    assert "Tokens per expert" not in text
    assert "NF4, rounded to nearest (block size 64, double quant)" in text
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img", text)


def test_page_of_a_calibrated_checkpoint(calibrated_checkpoint: Path) -> None:
    text = page(memory_report(calibrated_checkpoint))
    drawing = Drawing(text)
    errors, tokens = drawing.cells["Mean output error by layer and matrix"], drawing.cells["Tokens by layer and expert"]
    assert (len(errors), len(tokens)) == (DEMO_CELLS, 8 * 5)
    tips = [tip for _, tip, _ in errors]
    assert "layer 2, qkv_proj: output error 0.00300" in tips
    assert "layer 3, w3: output error 0.00402, mean of 5 experts; largest 0.00404, expert 4" in tips
    assert sum(tip.endswith("; 1 rounded to nearest") for tip in tips) == 3
    assert drawing.marks["Mean output error by layer and matrix"] == ["mark"] * 3
    tips = [tip for _, tip, _ in tokens]
    assert "layer 1, expert 0: 3 tokens (0.0018 × even); w1, w2, w3 rounded to nearest" in tips
    assert any(tip.startswith("layer 0, expert 1: ") and tip.endswith("; Hessian shrunk by 60 %") for tip in tips)
    assert sorted(drawing.marks["Tokens by layer and expert"]) == ["dot", "mark"]
    assert "layer 1, expert 0, w1, w2, w3: " in text
    assert "3 tokens, fewer than 4: nearest rounding" in text


def test_colours_follow_the_figures(calibrated_checkpoint: Path) -> None:
    """Output errors of the fixture grow with the layer; an expert without tokens has no colour of the ramp."""
    drawing = Drawing(page(memory_report(calibrated_checkpoint)))
    cells = drawing.cells["Mean output error by layer and matrix"]
    steps = [int(colour.removeprefix("error")) for colour, tip, _ in cells if ", qkv_proj:" in tip]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert len(set(steps)) > 4
    manifest = json.loads((calibrated_checkpoint / "minibble.json").read_text())
    rows = manifest["expert_tokens"]
    rows[2] = [0, 100, 200, 400, 300]
    change(calibrated_checkpoint, expert_tokens=rows)
    tokens = Drawing(page(memory_report(calibrated_checkpoint))).cells["Tokens by layer and expert"]
    colours = {tip.split(":")[0]: colour for colour, tip, _ in tokens}
    assert [colours[f"layer 2, expert {e}"] for e in range(5)] == ["none", "share4", "share6", "share8", "share7"]


def test_page_of_the_released_size(tmp_path: Path) -> None:
    config = builtin_config("minimax-text-01")
    (tmp_path / "minibble.json").write_text(json.dumps(calibrated(config)))
    text = page(replace(memory_report("minimax-text-01"), stored=True, quality=read_quality(tmp_path, config)))
    assert len(text) < 1_000_000
    drawing = Drawing(text)
    errors, tokens = drawing.cells["Mean output error by layer and matrix"], drawing.cells["Tokens by layer and expert"]
    assert len(errors) == 70 * 3 + 10 * 4 + 80 * 3
    places = {tip.split(":")[0] for _, tip, _ in tokens}
    assert places == {f"layer {layer}, expert {expert}" for layer in range(80) for expert in range(32)}
    for cells in (errors, tokens):
        assert len({place for _, _, place in cells}) == len(cells)
        assert all(float(x[:-1]) >= 0 and float(x[:-1]) + float(w[:-1]) <= 100.01 for _, _, (x, _, w, _) in cells)
    assert not re.search(r"<g class=\"\w+\"><title>[^<]*</title><rect[^>]*/><text", text)


def test_small_maps_carry_their_figures(calibrated_checkpoint: Path) -> None:
    text = page(memory_report(calibrated_checkpoint))
    figures = re.findall(r"<rect[^>]*/><text [^>]*>([^<]+)</text></g>", text)
    assert len(figures) == DEMO_CELLS + 8 * 5
    assert "0.0030" in figures


def test_legend_gives_the_ends(calibrated_checkpoint: Path) -> None:
    quality = quality_of(calibrated_checkpoint)
    means = [cell.mean for row in quality.by_matrix().values() for cell in row if cell is not None and cell.mean]
    legend = sections(quality).split('<div class="scale">')[1].split("</div>")[0]
    labels = re.findall(r">([0-9.e-]+)</text>", legend)
    assert (labels[0], labels[-1]) == (figure(min(means)), figure(max(means)))
    assert len(labels) == 4
    assert "output error, logarithmic" in legend


def test_long_list_of_fallbacks_is_cut(checkpoint: Path) -> None:
    manifest = calibrate_folder(checkpoint)
    del manifest["quantized"]["model.layers.1.block_sparse_moe.experts.0.w1.weight"]["fallback"]
    for layer in range(3, 8):
        for expert in range(5):
            for matrix in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                manifest["quantized"][name]["fallback"] = "too few"
    change(checkpoint, quantized=manifest["quantized"])
    text = sections(quality_of(checkpoint))
    assert text.count("<li>") == 20
    assert "layer 1, expert 0, w2, w3: " in text
    assert "and 18 more matrices" in text  # 26 experts, 20 of them listed


def test_terminal(cli, calibrated_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr("minibble.cli.output.PIPE_WIDTH", 100)
    lines = cli("report", calibrated_checkpoint).stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Quality: "))
    made, settings, errors, feed = (line.rstrip() for line in lines[start : start + 4])
    assert made == "Quality: GPTQ, calibrated on stories.txt: 8 × 512 = 4,096 tokens"
    assert settings == "  group size 128, damp 0.01, act order, sweeps 6"
    assert re.fullmatch(
        r"  mean output error 0\.00\d\d \(relative 0\.0090\), largest 0\.013 in layer 1, expert 0, w1", errors
    )
    assert feed.startswith(
        "  3 matrices rounded to nearest; Hessian shrunk ≥ 50 %: 3; least fed: layer 1, expert 0, 3 tokens"
    )
    monkeypatch.setattr("minibble.cli.output.PIPE_WIDTH", 80)
    assert max(map(len, cli("report", calibrated_checkpoint).stdout.splitlines())) <= 80


def test_terminal_of_others(cli, checkpoint: Path, source: Path) -> None:
    assert "Quality: NF4, rounded to nearest (block size 64, double quant)" in cli("report", checkpoint).stdout
    for target in (source, "minimax-text-01"):
        assert "Quality" not in cli("report", target).stdout
        assert "Quality" not in page(memory_report(target))
    (checkpoint / "minibble.json").unlink()
    assert "Quality" not in cli("report", checkpoint).stdout


def test_json(cli_json, calibrated_checkpoint: Path) -> None:
    quality = cli_json("report", calibrated_checkpoint)["quality"]
    assert quality["calibration"]["tokens"] == 8 * 512
    assert quality["by_matrix"]["qkv_proj"] == [0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, None]
    assert "quality" not in cli_json("report", "minimax-m1")


def test_samples_that_were_not_full(calibrated_checkpoint: Path) -> None:
    text = {"text": "short.txt", "samples": 3, "seq_len": 512, "tokens": 1300}
    change(calibrated_checkpoint, calibration=text)
    assert summary(quality_of(calibrated_checkpoint))[0].endswith("short.txt: 3 × 512, 1,300 tokens")


def test_text_of_the_manifest_is_no_markup(cli, calibrated_checkpoint: Path) -> None:
    manifest = json.loads((calibrated_checkpoint / "minibble.json").read_text())
    evil = "<img src=x>[bold]\x1b[31m & co"
    manifest["quantized"]["model.layers.1.block_sparse_moe.experts.0.w1.weight"]["fallback"] = evil
    change(
        calibrated_checkpoint,
        calibration=manifest["calibration"] | {"text": evil},
        settings={"method": evil, evil: evil},
        quantized=manifest["quantized"],
    )
    text = page(memory_report(calibrated_checkpoint))
    Drawing(text)
    assert "<img" not in text
    assert text.count("&lt;img src=x&gt;[bold]�[31m &amp; co") == 4
    printed = cli("report", calibrated_checkpoint).stdout
    assert "calibrated on <img src=x>[bold]�[31m & co" in " ".join(printed.split())
    assert "\x1b" not in printed + text


def test_damaged_manifest_is_one_line(cli, calibrated_checkpoint: Path) -> None:
    change(calibrated_checkpoint, expert_tokens=[[1, 2]])
    result = cli("report", calibrated_checkpoint)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert (
        "minibble.json: 'expert_tokens' must have a count for each of 8 layers × 5 experts; quantize" in result.stderr
    )


def test_unmeasured_cells_and_matrices_outside_the_layers(tmp_path: Path) -> None:
    quantize_checkpoint("demo", tmp_path / "demo", quantize_head=True)
    manifest = json.loads((tmp_path / "demo" / "minibble.json").read_text())
    head = manifest["quantized"]["lm_head.weight"]["relative_error"]
    assert f"Also in 4 bit: lm_head {figure(head)}." in page(memory_report(tmp_path / "demo"))
    manifest = calibrate_folder(tmp_path / "demo")
    del manifest["quantized"]["model.layers.7.self_attn.q_proj.weight"]["output_error"]
    change(tmp_path / "demo", quantized=manifest["quantized"] | {"lm_head.weight": {"relative_error": 0.01}})
    text = page(memory_report(tmp_path / "demo"))
    assert "Also in 4 bit: lm_head not measured." in text
    cells = Drawing(text).cells["Mean output error by layer and matrix"]
    assert [colour for colour, tip, _ in cells if tip == "layer 7, q_proj: output error not measured"] == ["none"]


@given(st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=20))
def test_steps_hold_what_the_legend_says(values: list[float]) -> None:
    colours = LogScale.over(values)
    assert colours.high / colours.low >= 1.499
    for value in values:
        step = colours.step(value)
        assert 0 <= step < ERROR_STEPS
        assert colours.edge(step) * (1 - 1e-9) <= value <= colours.edge(step + 1) * (1 + 1e-9)


def test_scale_of_nothing_and_of_zeros() -> None:
    for values in ([], [0.0], [0.0, 0.0]):
        assert LogScale.over(values).step(0.0) == 0
    assert LogScale.over([0.0, 0.01]).step(0.01) == ERROR_STEPS // 2


def test_steps_of_a_share() -> None:
    assert [share_step(share) for share in (0, 1 / 100, 1 / 8, 0.5, 1, 1.1, 1.2, 2, 8, 99)] == [
        0, 0, 0, 4, 6, 6, 7, 8, 12, 12,
    ]  # fmt: skip


@pytest.mark.parametrize("name", RAMPS)
def test_ramps(name: str) -> None:
    """A rule for every step on both pages, ends as given, text that can be read."""
    steps, *pages = RAMPS[name]
    style = ramp_style()
    for ends in pages:
        colours = spread(ends, steps)
        assert len(set(colours)) == steps == {"error": ERROR_STEPS, "share": SHARE_STEPS}[name]
        assert (colours[0], colours[steps // 2], colours[-1]) == tuple(ends)
        for step, colour in enumerate(colours):
            (text,) = re.findall(rf"\.{name}{step} rect{{fill:{colour}}} \.{name}{step} text{{fill:(#\w+)", style)
            light, dark = sorted((luminance(colour), luminance(text)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4
