"""Heat maps as inline SVG: a column for each layer; cells stretch with the page, text keeps its size.

A colour scale is a ramp of CSS classes, `.error0` to `.error8` and so on, each with its colour on a light and on a
dark page and a colour of text that can be read on it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import exp, log

ERROR_STEPS = 9
SHARE_STEPS = 13  # half powers of two around 1: from an eighth to eight times

# Per ramp, colours of a light page and of a dark one that the steps are spread between.
RAMPS = {
    "error": (ERROR_STEPS, ("#f6ecdd", "#e2945a", "#8f2a22"), ("#332d2a", "#a9572f", "#ffd09a")),
    "share": (SHARE_STEPS, ("#2f6f9f", "#efede8", "#bf5228"), ("#5fa5d8", "#30353c", "#ee9a62")),
}
# Columns up to which a cell has room for its figure, and rows' heights in pixels.
FIGURE_COLUMNS, TALLEST, LOWEST, ROOM = 12, 28, 11, 360

STYLE = """
p + figure > .wide > .map { margin-top: 1rem; }
.map { display: flex; min-width: max-content; overflow: clip; }
.map svg { height: auto; flex: none; } .map svg text { font-size: 13px; }
.map .names { width: 5.6rem; position: sticky; left: 0; background: var(--card); z-index: 1; }
.map .cells { flex: 1 1 0; width: 0; } .map .cells rect { stroke: var(--card); }
.map svg .mid, .scale svg .mid { text-anchor: middle; }
.map .cells g text { font-size: 12px; text-anchor: middle; pointer-events: none; }
.map .cells .mark { fill: none; stroke: var(--ink); stroke-width: 1.6px; pointer-events: none; }
.map .cells .dot { fill: var(--ink); pointer-events: none; }
.map .cells .none rect { fill: var(--card); stroke: var(--soft); }
.scale { max-width: 27rem; margin-top: 1rem; } .scale small { display: block; margin-bottom: .25rem; }
.scale svg text { font-size: 13px; }
.key .mark { border: 2px solid var(--ink); background: none; } .key .dot { background: var(--ink); width: .4em;
  height: .4em; border-radius: 50%; vertical-align: .2em; } .key .none { border: 1px solid var(--soft); }
.scale + .key { margin-top: .5rem; } .scale + p, .key + p { margin-top: .6rem; }
.plain { margin: .4rem 0 0; padding-left: 1.1rem; font-size: .92rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .map .cells g text { display: none; } .map .cells rect { stroke-width: .5px; } }
"""


@dataclass(frozen=True)
class HeatCell:
    """A cell: `colour` is a class of a ramp or `none`, `tip` what pointing at it says, `mark` "", "mark" or "dot"."""

    row: int
    column: int
    colour: str
    tip: str
    figure: str = ""
    mark: str = ""


@dataclass(frozen=True)
class LogScale:
    """Steps of equal ratio between `low` and `high`."""

    low: float
    high: float
    steps: int = ERROR_STEPS

    @classmethod
    def over(cls, values: Iterable[float], least_ratio: float = 1.5) -> "LogScale":
        """From the smallest to the largest of the positive `values`, widened to `least_ratio` so that differences
        of a few per cent do not look like much."""
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        widen = max(1.0, (least_ratio * low / high) ** 0.5)
        return cls(low / widen, high * widen)

    def step(self, value: float) -> int:
        """The step that holds `value`: 0 to steps - 1, the ends for what lies outside."""
        if value <= self.low:
            return 0
        return min(int(self.steps * log(value / self.low) / log(self.high / self.low)), self.steps - 1)

    def edge(self, number: int) -> float:
        """The lower end of step `number`; that of step `steps` is the upper end of the last."""
        return self.low * exp(log(self.high / self.low) * number / self.steps)


def share_step(share: float) -> int:
    """The step of a share relative to an even one, on a scale of half powers of two."""
    middle = SHARE_STEPS // 2
    return 0 if share <= 0 else min(max(round(2 * log(share, 2)) + middle, 0), SHARE_STEPS - 1)


def ramp_style() -> str:
    """CSS of all ramps."""
    light = [_rule(name, i, c) for name, (n, ends, _) in RAMPS.items() for i, c in enumerate(spread(ends, n))]
    dark = [_rule(name, i, c) for name, (n, _, ends) in RAMPS.items() for i, c in enumerate(spread(ends, n))]
    return f"{''.join(light)}\n@media (prefers-color-scheme: dark) {{ {''.join(dark)} }}\n"


def spread(ends: Sequence[str], steps: int) -> list[str]:
    """`steps` colours "#rrggbb" along the line through `ends`, linear in sRGB."""
    stops = [[int(end[at : at + 2], 16) for at in (1, 3, 5)] for end in ends]
    colours = []
    for step in range(steps):
        at = step * (len(stops) - 1) / (steps - 1)
        left = min(int(at), len(stops) - 2)
        mixed = (round(a + (b - a) * (at - left)) for a, b in zip(stops[left], stops[left + 1], strict=True))
        colours.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return colours


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1, as WCAG 2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rule(name: str, step: int, colour: str) -> str:
    text = "#1d2126" if luminance(colour) > 0.21 else "#ffffff"  # there both have a contrast of 4
    return f".{name}{step} rect{{fill:{colour}}} .{name}{step} text{{fill:{text} !important}}\n"


def heat_map(rows: Sequence[str], columns: int, cells: Iterable[HeatCell], label: str, gap: int = 0) -> str:
    """The map with a name before each of `rows`, numbered columns below, and some space before row `gap`."""
    height = min(TALLEST, max(LOWEST, ROOM // len(rows)))
    tops = [row * height + 8 * (row >= gap > 0) for row in range(len(rows))]
    bottom = tops[-1] + height
    every = 1 if height >= 15 else 4
    names = "".join(
        f'<text x="0" y="{top + height / 2 + 4.5:g}">{escape(name)}</text>'
        for row, (name, top) in enumerate(zip(rows, tops, strict=True))
        if row % every == 0
    )
    names += f'<text class="soft" x="0" y="{bottom + 18}">layer</text>'
    drawn, marks = [], []
    for cell in cells:
        drawn.append(_cell(cell, columns, tops[cell.row], height))
        if cell.mark:
            marks.append(_mark(cell, columns, tops[cell.row], height))
    size = f'style="height:{bottom + 24}px'
    return (
        f'<div class="wide"><div class="map"><svg class="names" {size}" aria-hidden="true">{names}</svg>'
        f'<svg class="cells" {size};min-width:{max(3 * columns, 200)}px" role="img" aria-label="{escape(label)}">'
        f"{''.join(drawn)}{''.join(marks)}{_axis(columns, bottom + 18)}</svg></div></div>"
    )


def _cell(cell: HeatCell, columns: int, top: int, height: int) -> str:
    width = 100 / columns
    text = ""
    if cell.figure and columns <= FIGURE_COLUMNS:
        middle = (cell.column + 0.5) * width
        text = f'<text x="{middle:.2f}%" y="{top + height / 2 + 4:g}">{escape(cell.figure)}</text>'
    return (
        f'<g class="{cell.colour}"><title>{escape(cell.tip)}</title>'
        f'<rect x="{cell.column * width:.2f}%" y="{top}" width="{width:.2f}%" height="{height}" rx="2"/>{text}</g>'
    )


def _mark(cell: HeatCell, columns: int, top: int, height: int) -> str:
    width = 100 / columns
    if cell.mark == "dot":
        radius = min(2.5, height / 7)
        x = (cell.column + (0.5 if columns > FIGURE_COLUMNS else 0.92)) * width
        return f'<circle class="dot" cx="{x:.2f}%" cy="{top + height / 2:g}" r="{radius:.1f}"/>'
    return (
        f'<rect class="mark" x="{cell.column * width:.2f}%" y="{top}" width="{width:.2f}%" height="{height}" rx="2"/>'
    )


def _axis(columns: int, y: int) -> str:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if columns <= 12 * step)
    width = 100 / columns
    places = [(column, "soft mid", (column + 0.5) * width) for column in range(0, columns, every)]
    if every > 1:  # a narrow first cell: its number must not stick out to the left
        places[0] = (0, "soft", 0.0)
    return "".join(f'<text class="{style}" x="{x:.2f}%" y="{y}">{column}</text>' for column, style, x in places)


def scale(ramp: str, labels: Sequence[tuple[float, str]], caption: str) -> str:
    """The legend of a ramp: its steps side by side, `labels` at positions counted in steps from the left end."""
    steps = RAMPS[ramp][0]
    width = 100 / steps
    swatches = "".join(
        f'<g class="{ramp}{step}"><rect x="{step * width:.2f}%" y="0" width="{width:.2f}%" height="13"/></g>'
        for step in range(steps)
    )
    texts = []
    for position, text in labels:
        anchor = "" if position == 0 else "end" if position == steps else "mid"
        texts.append(f'<text class="soft {anchor}" x="{position * width:.2f}%" y="29">{escape(text)}</text>')
    drawing = f'<svg style="height:34px" role="img" aria-label="Colours">{swatches}{"".join(texts)}</svg>'
    return f'<div class="scale"><small>{escape(caption)}, logarithmic</small>{drawing}</div>'


def thirds(colours: LogScale) -> list[tuple[int, float]]:
    """Positions and values at the ends of a logarithmic scale and at two places between."""
    return [(number, colours.edge(number)) for number in range(0, colours.steps + 1, colours.steps // 3)]
