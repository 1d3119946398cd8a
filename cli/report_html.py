"""The report as one self-contained page: inline style and SVG, nothing loaded from anywhere."""

from html import escape
from typing import TYPE_CHECKING

from minibble.cli import report_placement, report_quality
from minibble.cli.report import columns, count, headline, units
from minibble.quantize.sizes import binary, decimal
from minibble.runtime.footprint import FORMAT_NOTES, PARTS, Footprint, kv_cache_bytes

if TYPE_CHECKING:
    from minibble.runtime.report import MemoryReport

# Width of the drawings in their own units; they scale with the page.
WIDTH, BAR, GAP = 1000, 34, 26
CONTEXTS = (8_192, 32_768, 131_072, 1_048_576)

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d2126; --soft: #646b75;
  --line: #e4e1db; --experts: #2f6f9f; --attention: #d2703c; --embeddings: #7a9a3b;
  --other: #8a6fb0; --state: #b0495f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1c2026; --ink: #e8e6e1; --soft: #9aa2ad;
  --line: #2d333b; --experts: #5a9bcb; --attention: #e08d5c; --embeddings: #9dbb60; --other: #a98fd0;
  --state: #d4748a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .9rem; }
p { margin: .15rem 0; } .soft, small, figcaption { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.4rem;
  margin-top: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1.1rem; margin-top: 1.5rem; }
.tiles section { margin: 0; } .tiles b { display: block; font-size: 1.55rem; line-height: 1.25; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 17px; }
svg text.soft { fill: var(--soft); } svg text.end { text-anchor: end; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin-top: .9rem; font-size: .92rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .36rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; padding-bottom: 0; } thead small { font-weight: 400; }
tbody tr td { border-top: 1px solid var(--line); } tr.total td { font-weight: 700; }
td.soft { color: var(--soft); } figure + .wide { margin-top: 1rem; }
.chosen { text-decoration: underline 2px var(--experts); text-underline-offset: 4px; }
"""


def page(report: "MemoryReport") -> str:
    """The whole page as HTML text."""
    shown, quality = columns(report), report.quality
    title = f"{report.target}: where the bytes go"
    extra_style, extra = (report_quality.style(), report_quality.sections(quality)) if quality is not None else ("", "")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}{extra_style}</style>
</head>
<body>
<main>
<h1>{escape(report.target)}</h1>
{"".join(f'<p class="soft">{escape(line)}</p>' for line in headline(report))}
{_tiles(report)}
<section><h2>Where the bytes go</h2>{_format_bars(shown)}</section>
<section><h2>In numbers</h2>{_table(report, shown)}{_notes(shown)}</section>
<section><h2>Running it</h2>{_running(report)}</section>
{_placed(report)}
<section><h2>Layers</h2>{_layers(report)}</section>
{extra}
</main>
</body>
</html>
"""


def _placed(report: "MemoryReport") -> str:
    """Which layers and experts go where, if that was asked."""
    placement = report.placement
    if placement is None:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("GPU, in GB", *report_placement.HEAD))
    rows = (
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in report_placement.row(device)) + "</tr>"
        for device in placement.devices
    )
    below = (*report_placement.elsewhere(placement), report_placement.expected_text(placement))
    lines = "".join(f'<p class="soft">{escape(line)}</p>' for line in below)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>On these GPUs</h2><div class="wide">{table}</div>{lines}</section>'


def _tiles(report: "MemoryReport") -> str:
    weights = report.weights
    kind = f", {weights.format} on disk" if report.stored else f" in {weights.format}"
    tiles = [
        (count(report.parameters), "parameters"),
        (decimal(weights.total_bytes), f"{binary(weights.total_bytes)}{kind}"),
        (f"{weights.bits_per_weight:.3f}", "bits per weight"),
        (decimal(report.running_bytes), f"with cache and state, {_load(report)}"),
    ]
    boxes = (f"<section><b>{escape(big)}</b><small>{escape(small)}</small></section>" for big, small in tiles)
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _format_bars(shown: dict[str, Footprint]) -> str:
    largest = max(weights.total_bytes for weights in shown.values())
    rows, y = [], 0
    for name, weights in shown.items():
        parts = {part: weights.parts[part] for part in PARTS}
        rows.append(_row(y, name, parts, decimal(weights.total_bytes), WIDTH / largest))
        y += BAR + GAP + 14
    drawing = _svg(y - 14, "".join(rows), "Bytes of each part in each format")
    return f"<figure>{drawing}{_key(PARTS)}</figure>"


def _row(y: int, name: str, parts: dict[str, int], total: str, per_byte: float) -> str:
    """A label above a stacked bar; every segment says its bytes when pointed at."""
    out = [f'<text x="0" y="{y + 18}">{escape(name)}</text>']
    x = 0.0
    for part, nbytes in parts.items():
        width = nbytes * per_byte
        tip = f"{part}: {decimal(nbytes)} ({binary(nbytes)}), {nbytes:,} bytes"
        out.append(
            f'<rect x="{x:.2f}" y="{y + GAP}" width="{width:.2f}" height="{BAR}" '
            f'style="fill:var(--{_colour(part)})"><title>{escape(tip)}</title></rect>'
        )
        x += width
    out.append(f'<text class="soft end" x="{WIDTH}" y="{y + 18}">{escape(total)}</text>')
    return "".join(out)


def _colour(part: str) -> str:
    return {"KV cache": "embeddings", "state": "state", "weights": "experts"}.get(part, part)


def _svg(height: int, body: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _key(parts: tuple[str, ...]) -> str:
    spans = (f'<span><i style="background:var(--{_colour(part)})"></i>{escape(part)}</span>' for part in parts)
    return f'<div class="key">{"".join(spans)}</div>'


def _table(report: "MemoryReport", shown: dict[str, Footprint]) -> str:
    decimal_scale, decimal_unit, binary_scale, binary_unit = units(list(shown.values()))
    chosen = "on disk" if report.stored else report.weights.format

    def row(name: str, values: list[int], style: str = "") -> str:
        cells = (f'<td>{v / decimal_scale:,.2f}</td><td class="soft">{v / binary_scale:,.2f}</td>' for v in values)
        return f'<tr class="{style}"><td>{escape(name)}</td>{"".join(cells)}</tr>'

    heads = "".join(
        f'<th colspan="2"><span class="{"chosen" if name == chosen else ""}">{escape(name)}</span></th>'
        for name in shown
    )
    unit_heads = f"<th><small>{decimal_unit}</small></th><th><small>{binary_unit}</small></th>" * len(shown)
    body = "".join(row(part, [weights.parts[part] for weights in shown.values()]) for part in PARTS)
    body += row("total", [weights.total_bytes for weights in shown.values()], "total")
    bits = "".join(f'<td colspan="2">{weights.bits_per_weight:.3f}</td>' for weights in shown.values())
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr><tr><th></th>{unit_heads}</tr></thead>'
        f"<tbody>{body}<tr><td>bits per weight</td>{bits}</tr></tbody></table></div>"
    )


def _notes(shown: dict[str, Footprint]) -> str:
    notes = (f"<b>{escape(name)}</b> {escape(FORMAT_NOTES[name])}" for name in shown if name in FORMAT_NOTES)
    return f"<p><small>{'; '.join(notes)}. GB is 10⁹ bytes, GiB is 2³⁰.</small></p>"


def _running(report: "MemoryReport") -> str:
    parts = {
        "weights": report.weights.total_bytes,
        "KV cache": report.kv_cache_bytes,
        "state": report.state_bytes,
    }
    name = f"{report.weights.format}, {_load(report)}"
    bar = _row(0, name, parts, decimal(report.running_bytes), WIDTH / report.running_bytes)
    rows = "".join(
        f'<tr><td>{what}</td><td>{decimal(nbytes)}</td><td class="soft">{binary(nbytes)}</td></tr>'
        for what, nbytes in (*parts.items(), ("together", report.running_bytes))
    )
    cache = "".join(
        f"<tr><td>KV cache at {context:,} tokens</td><td>{decimal(nbytes)}</td>"
        f'<td class="soft">{binary(nbytes)}</td></tr>'
        for context in CONTEXTS
        if context > report.context and (nbytes := kv_cache_bytes(report.config, context, report.batch))
    )
    return (
        f"<figure>{_svg(BAR + GAP, bar, 'Bytes while running')}{_key(tuple(parts))}</figure>"
        f'<div class="wide"><table><tbody>{rows}{cache}</tbody></table></div>'
        "<p><small>Only softmax layers keep a cache that grows; the state of lightning layers has one size, "
        "however long the text. Activations and workspace come on top.</small></p>"
    )


def _load(report: "MemoryReport") -> str:
    sequences = f" in each of {report.batch:,} sequences" if report.batch > 1 else ""
    return f"{report.context:,} tokens{sequences}"


def _layers(report: "MemoryReport") -> str:
    """A square for each layer, in its kind's colour."""
    per_row, side = 40, 25
    squares = []
    for layer, kind in enumerate(report.config.attention):
        x, y = layer % per_row * side, layer // per_row * side
        colour = "attention" if kind == "softmax" else "experts"
        squares.append(
            f'<rect x="{x}" y="{y}" width="{side - 4}" height="{side - 4}" rx="4" '
            f'style="fill:var(--{colour})"><title>layer {layer}: {kind}</title></rect>'
        )
    height = -(-len(report.config.attention) // per_row) * side
    key = (
        '<div class="key"><span><i style="background:var(--experts)"></i>lightning: constant state</span>'
        '<span><i style="background:var(--attention)"></i>softmax: KV cache</span></div>'
    )
    return f"<figure>{_svg(height, ''.join(squares), 'Kinds of layers')}{key}</figure>"
