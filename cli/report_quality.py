"""A 4-bit checkpoint's quality in the report: a few lines, and heat maps of errors and of tokens per expert."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

from minibble.cli.heatmap import STYLE, HeatCell, LogScale, heat_map, ramp_style, scale, share_step, thirds
from minibble.runtime.quality import Cell, ExpertFeed, MatrixRecord, Quality

LISTED = 20
# Every Hessian of an expert is shrunk somewhat; from here on the layer's mean counts more than the expert's tokens.
NOTABLE_SHRINKAGE = 0.5
# Settings that the report shows elsewhere, or that say nothing about quality.
_UNSHOWN = ("method", "shard_size", "quantize_head", "quantize_embedding")
_MEASURES = {"output_error": "output error", "relative_error": "relative error"}
_EXPLAINED = {
    "output_error": "Output error: the share of a matrix's output on the calibration text, squared and summed, that is "
    "lost by its 4 bits.",
    "relative_error": "Relative error: the share of a matrix's squared weights that is lost by rounding to 4 bits.",
}


def style() -> str:
    """CSS that the sections need beside the page's own."""
    return STYLE + ramp_style()


def figure(value: float, digits: int = 2) -> str:
    """An error with two significant digits: 0.0084, 0.0090, 3.1e-05."""
    return f"{value:#.{digits}g}"


def summary(quality: Quality) -> list[str]:
    """How the checkpoint was made and how good it is, in two to four lines of plain text."""
    method, settings = str(quality.settings.get("method", "4 bit")).upper(), ", ".join(_settings(quality))
    calibration, worst = quality.calibration, quality.worst
    if calibration is None:
        made = [f"{method}, rounded to nearest" + (f" ({settings})" if settings else "")]
    else:
        made = [f"{method}, calibrated on {calibration.text}: {_windows(quality)}", *([settings] if settings else [])]
    errors = f"mean {_MEASURES[quality.measure]} {figure(_mean(quality))}"
    if quality.measure != "relative_error":
        errors += f" (relative {figure(quality.mean_relative_error)})"
    errors += f", largest {_error_text(quality, worst)} in {worst.place}"
    return [*made, errors, *_feed_line(quality)]


def _settings(quality: Quality) -> Iterator[str]:
    """Settings in words: group size 128, damp 0.01, act order."""
    for key, value in quality.settings.items():
        if key in _UNSHOWN or value is None or value is False or isinstance(value, list | dict):
            continue
        name = key.replace("_", " ")
        yield name if value is True else f"{name} {value}"


def _windows(quality: Quality) -> str:
    text = quality.calibration
    assert text is not None
    product = text.samples * text.seq_len == text.tokens
    return f"{text.samples:,} × {text.seq_len:,}{' =' if product else ','} {text.tokens:,} tokens"


def _mean(quality: Quality) -> float:
    output = quality.mean_output_error
    return quality.mean_relative_error if output is None else output


def _feed_line(quality: Quality) -> list[str]:
    """What was short of tokens, in one line; none for a checkpoint without a calibration."""
    feeds = quality.feeds()
    if quality.calibration is None and not feeds:
        return []
    fallbacks, shrunk = len(quality.fallbacks), sum(map(_shrunk, quality.records))
    line = f"{fallbacks:,} {_plural(fallbacks, 'matrix', 'matrices')} rounded to nearest; "
    line += f"Hessian shrunk ≥ {100 * NOTABLE_SHRINKAGE:.0f} %: {shrunk:,}"
    if feeds:
        least = min(feeds, key=lambda feed: (feed.share, feed.tokens))
        line += f"; least fed: layer {least.layer}, expert {least.expert}, {_fed(least)}"
    return [line]


def _shrunk(record: MatrixRecord) -> bool:
    return record.shrinkage is not None and record.shrinkage >= NOTABLE_SHRINKAGE


def _plural(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def _fed(feed: ExpertFeed) -> str:
    tokens = f"{feed.tokens:,} {_plural(feed.tokens, 'token', 'tokens')}"
    return f"{tokens} ({feed.share:.2g} × even)" if feed.tokens else tokens


def sections(quality: Quality) -> str:
    """The page's sections: errors by layer and matrix, and tokens per expert where they were counted."""
    made, *rest = summary(quality)
    lines = f"<p>{escape(made)}</p>" + "".join(f'<p class="soft">{escape(line)}</p>' for line in rest)
    parts = [f"<section><h2>Quality: error by layer and matrix</h2>{lines}{_error_map(quality)}</section>"]
    if quality.expert_tokens is not None:
        parts.append(f"<section><h2>Tokens per expert</h2>{_token_map(quality)}</section>")
    if quality.fallbacks:
        parts.append(f"<section><h2>Rounded to nearest</h2>{_fallback_list(quality.fallbacks)}</section>")
    return "".join(parts)


def _error_map(quality: Quality) -> str:
    rows = quality.by_matrix()
    if not rows:
        return _outside(quality)
    means = [cell.mean for cells in rows.values() for cell in cells if cell is not None and cell.mean is not None]
    colours = LogScale.over(means)
    cells = [
        _error_cell(quality, row, layer, cell, colours)
        for row, line in enumerate(rows.values())
        for layer, cell in enumerate(line)
        if cell is not None
    ]
    name = _MEASURES[quality.measure]
    experts = next(
        (n for n, line in enumerate(rows.values()) if any(c and c.worst.spec.role == "expert" for c in line)), 0
    )
    drawing = heat_map(list(rows), quality.layers, cells, f"Mean {name} by layer and matrix", gap=experts)
    legend = scale("error", [(position, figure(value)) for position, value in thirds(colours)], name)
    key = _key({"mark": "has matrices rounded to nearest"} if quality.fallbacks else {})
    return (
        f"<figure>{drawing}{legend}{key}</figure><p><small>{_EXPLAINED[quality.measure]} "
        f"The experts' rows are means over a layer's experts.</small></p>{_outside(quality)}"
    )


def _outside(quality: Quality) -> str:
    """The 4-bit matrices that belong to no layer."""
    errors = (f"{record.matrix} {_error_text(quality, record)}" for record in quality.outside)
    return f"<p><small>Also in 4 bit: {escape(', '.join(errors))}.</small></p>" if quality.outside else ""


def _error_text(quality: Quality, record: MatrixRecord, digits: int = 2) -> str:
    error = quality.error(record)
    return "not measured" if error is None else figure(error, digits)


def _error_cell(quality: Quality, row: int, layer: int, cell: Cell, colours: LogScale) -> HeatCell:
    name, worst = _MEASURES[quality.measure], cell.worst
    tip = f"layer {layer}, {worst.matrix}: {name} {'not measured' if cell.mean is None else figure(cell.mean, 3)}"
    if len(cell.records) > 1 and cell.mean is not None:
        tip += f", mean of {len(cell.records)} experts; largest {_error_text(quality, worst, 3)}, "
        tip += f"expert {worst.spec.expert}"
    fallbacks = sum(record.fallback is not None for record in cell.records)
    if fallbacks:
        tip += f"; {fallbacks} rounded to nearest"
    mark = "mark" if fallbacks else ""
    if cell.mean is None:
        return HeatCell(row, layer, "none", tip, mark=mark)
    return HeatCell(row, layer, f"error{colours.step(cell.mean)}", tip, figure(cell.mean), mark)


def _token_map(quality: Quality) -> str:
    records: dict[tuple[int | None, int | None], list[MatrixRecord]] = {}
    for record in quality.records:
        records.setdefault((record.spec.layer, record.spec.expert), []).append(record)
    feeds = quality.feeds()
    cells = [_token_cell(feed, records.get((feed.layer, feed.expert), [])) for feed in feeds]
    experts = 1 + max(feed.expert for feed in feeds)
    drawing = heat_map([f"expert {n}" for n in range(experts)], quality.layers, cells, "Tokens by layer and expert")
    labels = ((0.5, "⅛"), (2.5, "¼"), (4.5, "½"), (6.5, "even"), (8.5, "2×"), (10.5, "4×"), (12.5, "8×"))
    shrunk = f"Hessian shrunk by {100 * NOTABLE_SHRINKAGE:.0f} % or more toward the layer's mean"
    keys = {"none": "no tokens", "mark": "rounded to nearest", "dot": shrunk}
    seen = {cell.mark for cell in cells} | {cell.colour for cell in cells}
    key = _key({kind: text for kind, text in keys.items() if kind in seen})
    return (
        f"<figure>{drawing}{scale('share', labels, 'tokens')}{key}</figure>"
        "<p><small>Calibration tokens that the router sent to each expert, relative to an even distribution over its "
        "layer's experts.</small></p>"
    )


def _token_cell(feed: ExpertFeed, records: Sequence[MatrixRecord]) -> HeatCell:
    tip = f"layer {feed.layer}, expert {feed.expert}: {_fed(feed)}"
    shrinkage = [record.shrinkage for record in records if record.shrinkage is not None]
    fallbacks = [record.matrix for record in records if record.fallback is not None]
    if shrinkage:
        tip += f"; Hessian shrunk by {100 * max(shrinkage):.2g} %"
    if fallbacks:
        tip += f"; {', '.join(fallbacks)} rounded to nearest"
    mark = "mark" if fallbacks else "dot" if any(map(_shrunk, records)) else ""
    colour = f"share{share_step(feed.share)}" if feed.tokens else "none"
    return HeatCell(feed.expert, feed.layer, colour, tip, f"{feed.tokens:,}", mark)


def _key(marks: Mapping[str, str]) -> str:
    spans = "".join(f'<span><i class="{kind}"></i>{escape(text)}</span>' for kind, text in marks.items())
    return f'<div class="key">{spans}</div>' if spans else ""


def _fallback_list(fallbacks: Sequence[MatrixRecord]) -> str:
    """One line for the matrices of an expert that share a reason; the first LISTED, and how many more there are."""
    groups = [list(group) for _, group in groupby(fallbacks, lambda r: (r.spec.layer, r.spec.expert, r.fallback))]
    lines = []
    for group in groups[:LISTED]:
        place = ", ".join([group[0].place, *(record.matrix for record in group[1:])])
        lines.append(f'<li>{escape(place)}: <span class="soft">{escape(group[0].fallback or "")}</span></li>')
    left = sum(map(len, groups[LISTED:]))
    more = f'<p class="soft">and {left:,} more {_plural(left, "matrix", "matrices")}</p>' if left else ""
    return f'<ul class="plain">{"".join(lines)}</ul>{more}'
