"""Charts as inline SVG: lines with markers and stacked bars, with nothing but the standard library.

A report has to open years later without a network, so its pictures are part of the page. Colours
are CSS classes of the page (`html.STYLE`), which is how one picture serves light and dark. Every
marker carries a `<title>` with its exact numbers, which browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_fast.report.html import escape

WIDTH, HEIGHT = 560.0, 340.0
# Small charts stand three in a row: fewer units across keep their letters as large on screen.
SMALL_WIDTH, SMALL_HEIGHT = 380.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 16.0, 12.0, 46.0
_NAME_LETTERS = 26  # that fit before a bar
# More marks than this are invisible at this width and make the page slow.
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: legend entry.
        points: (x, y) pairs; those that are not finite interrupt the line.
        colour: 1 to 6, an entry of the page's palette.
        dashed: draw the line dashed.
        markers: draw a dot at each point.
        labels: text of the hover of each point; empty for plain numbers.
        errors: half-length of a vertical error bar at each point; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    dashed: bool = False
    markers: bool = False
    labels: Sequence[str] = ()
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """An axis: its label, and how a tick value is written (the value itself if not given).

    A logarithmic one shows positive values only.
    """

    label: str
    tick_text: Callable[[float], str] | None = None
    log: bool = False


def line_chart(
    title: str, series: Sequence[Series], x: Axis, y: Axis, *, small: bool = False
) -> str:
    """Draw lines over common axes; returns a `<figure>` with title, legend and SVG.

    Series without a single finite point are left out; a chart without any says so.
    """
    series = [_positive(line, x.log, y.log) for line in series]
    series = [_thinned(line) for line in series if any(map(_finite, line.points))]
    if not series:
        return _figure(title, "", '<p class="quiet">no data</p>')
    points = [point for line in series for point in line.points if _finite(point)]
    bars = [
        (px, py + side * error)
        for line in series
        for (px, py), error in zip(line.points, line.errors, strict=False)
        for side in (-1, 1)
        if _finite((px, py + side * error)) and (py + side * error > 0.0 or not y.log)
    ]
    size = (SMALL_WIDTH, SMALL_HEIGHT) if small else (WIDTH, HEIGHT)
    frame = _Frame.around(points + bars, *size, x.log, y.log)
    # A small chart shows one metric, which its title names: a label beside it would say the same.
    body = [_axes(frame, x, Axis("", y.tick_text, y.log) if small else y)]
    body += [_line(frame, line) for line in series]
    description = escape(f"{title}: {y.label} against {x.label}")
    box = f"0 0 {frame.width:g} {frame.height:g}"
    svg = f'<svg viewBox="{box}" role="img" aria-label="{description}">' + "".join(body) + "</svg>"
    legend = _legend(series) if len(series) > 1 or series[0].name else ""
    return _figure(title, legend, svg)


def bar_chart(title: str, seconds: Sequence[tuple[str, float]]) -> str:
    """Draw one horizontal bar per (name, seconds), longest scale to fit, with shares of the sum."""
    rows = [(name, value) for name, value in seconds if math.isfinite(value) and value > 0.0]
    total = sum(value for _, value in rows)
    return bars_figure(
        title,
        [
            (
                name,
                [Part(name, value, index % 6 + 1)],
                f"{seconds_text(value)}, {value / total:.0%}",
            )
            for index, (name, value) in enumerate(rows)
        ],
    )


@dataclass(frozen=True)
class Part:
    """A part of a bar: what it stands for, its length, its colour in the page's palette."""

    name: str
    value: float
    colour: int


Bar = tuple[str, Sequence[Part], str]


def stacked_chart(
    title: str, bars: Sequence[tuple[str, Mapping[str, float]]], text: Callable[[float], str]
) -> str:
    """Draw one horizontal bar per (name, part -> length), with its sum; equal parts, one colour.

    Args:
        title: caption.
        bars: from top to bottom; parts that are not positive numbers are left out.
        text: writes a length.
    """
    names = list(dict.fromkeys(part for _, parts in bars for part in parts))
    rows: list[Bar] = []
    for name, parts in bars:
        kept = {p: v for p, v in parts.items() if math.isfinite(v) and v > 0.0}
        drawn = [Part(p, v, names.index(p) % 6 + 1) for p, v in kept.items()]
        if drawn:
            rows.append((name, drawn, text(sum(kept.values()))))
    legend = _legend([Series(part, (), index % 6 + 1) for index, part in enumerate(names)])
    return bars_figure(title, rows, legend, text)


def bars_figure(
    title: str,
    bars: Sequence[Bar],
    legend: str = "",
    text: Callable[[float], str] | None = None,
) -> str:
    """A figure of horizontal bars: (name, its parts, what stands behind it).

    Names stand before their bars, or above them if one is too long for that.
    """
    if not bars:
        return _figure(title, "", '<p class="quiet">no data</p>')
    longest = max(sum(part.value for part in parts) for _, parts, _ in bars)
    above = any(len(name) > _NAME_LETTERS for name, _, _ in bars)
    step, start, room = (48.0, 4.0, WIDTH - 180.0) if above else (30.0, 174.0, WIDTH - 330.0)
    body = []
    for index, (name, parts, behind) in enumerate(bars):
        top, left = index * step, start
        if above:
            body.append(f'<text x="4" y="{top + 16:g}" class="tick">{escape(name[:90])}</text>')
            top += step - 30.0
        else:
            body.append(
                f'<text x="164" y="{top + 19:g}" class="tick" text-anchor="end">'
                f"{escape(name)}</text>"
            )
        for part in parts:
            width = max(room * part.value / longest, 1.0)
            value = "" if text is None else f": {text(part.value)}"
            body.append(
                f'<rect x="{left:.1f}" y="{top + 6:g}" width="{width:.1f}" height="18" rx="3" '
                f'class="fill c{part.colour}"><title>{escape(part.name + value)}</title></rect>'
            )
            left += width
        body.append(
            f'<text x="{left + 8:.1f}" y="{top + 19:g}" class="tick">{escape(behind)}</text>'
        )
    height = len(bars) * step + 4
    svg = (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )
    return _figure(title, legend, svg)


def seconds_text(value: float) -> str:
    """A duration for people: `340 ms`, `12.3 s`, `4 min 05 s`."""
    if not math.isfinite(value):
        return "n/a"
    if value < 1.0:
        return f"{value * 1000:.0f} ms"
    if value < 100.0:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that cover [low, high]: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low, high: finite, low < high.
        count: about how many are wanted.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from 10**low to 10**high: powers of ten, with 2 and 5 times them if few."""
    for factors, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        powers = range(math.floor(low), math.floor(high) + 1)
        found = [f * 10.0**p for p in powers if p % every == 0 for f in factors]
        found = [v for v in found if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        if len(found) <= count + 1:
            break
    return found


def number_text(value: float) -> str:
    """A number in at most about six characters, without a needless exponent."""
    if value == 0.0 or not math.isfinite(value):
        return "0" if value == 0.0 else "n/a"
    if 1e-4 <= abs(value) < 1e5:
        text = f"{value:.4g}"
        return f"{float(text):.0f}" if "e" in text else text
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")


@dataclass(frozen=True)
class _Frame:
    """The data rectangle and its map to picture coordinates."""

    x_low: float  # of a logarithmic axis the logarithm to base 10
    x_high: float
    y_low: float
    y_high: float
    width: float
    height: float
    x_log: bool
    y_log: bool

    @classmethod
    def around(
        cls,
        points: Sequence[tuple[float, float]],
        width: float,
        height: float,
        x_log: bool = False,
        y_log: bool = False,
    ) -> _Frame:
        x_low, x_high = _padded([_scaled(x, x_log) for x, _ in points], 0.02)
        y_low, y_high = _padded([_scaled(y, y_log) for _, y in points], 0.06)
        return cls(x_low, x_high, y_low, y_high, width, height, x_log, y_log)

    def x(self, value: float) -> float:
        part = (_scaled(value, self.x_log) - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + part * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        part = (_scaled(value, self.y_log) - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - part * (self.height - _TOP - _BOTTOM)


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _padded(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * margin
    return low - pad, high + pad


def _axes(frame: _Frame, x: Axis, y: Axis) -> str:
    bottom, right = frame.height - _BOTTOM, frame.width - _RIGHT
    parts = []
    count = 4 if frame.height < HEIGHT else 6
    for value in (log_ticks if frame.y_log else ticks)(frame.y_low, frame.y_high, count):
        at = frame.y(value)
        text = (y.tick_text or number_text)(value)
        parts.append(
            f'<line x1="{_LEFT:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
            f'<text x="{_LEFT - 8:g}" y="{at + 4:.1f}" class="tick" text-anchor="end">'
            f"{escape(text)}</text>"
        )
    count = 5 if frame.width < WIDTH else 7
    for value in (log_ticks if frame.x_log else ticks)(frame.x_low, frame.x_high, count):
        at = frame.x(value)
        text = (x.tick_text or number_text)(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}" class="axis"/>'
            f'<text x="{at:.1f}" y="{bottom + 18:g}" class="tick" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
    parts.append(
        f'<line x1="{_LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}" class="axis"/>'
        f'<text x="{middle_x:g}" y="{frame.height - 8:g}" class="label" text-anchor="middle">'
        f"{escape(x.label)}</text>"
    )
    if y.label:
        parts.append(
            f'<text x="14" y="{middle_y:g}" class="label" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle_y:g})">{escape(y.label)}</text>'
        )
    return "".join(parts)


def _line(frame: _Frame, line: Series) -> str:
    parts = []
    for run in _runs(line.points):
        path = " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in run)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" class="line c{line.colour}"{dash}/>')
    for (px, py), error in zip(line.points, line.errors, strict=False):
        if _finite((px, py)) and error > 0.0:
            at, low, high = frame.x(px), frame.y(py - error), frame.y(py + error)
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
                f'class="line thin c{line.colour}"/>'
            )
    # A line of one point is invisible without its dot.
    if line.markers or len(line.points) == 1:
        parts += [_marker(frame, line, index) for index in range(len(line.points))]
    return "".join(parts)


def _marker(frame: _Frame, line: Series, index: int) -> str:
    px, py = line.points[index]
    if not _finite((px, py)):
        return ""
    text = f"{line.name} {line.labels[index] if line.labels else ''}".strip()
    hover = escape(f"{text}: x {number_text(px)}, y {number_text(py)}")
    kind = "dot hollow" if line.dashed else "dot"
    return (
        f'<circle cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}" r="3.6" '
        f'class="{kind} c{line.colour}"><title>{hover}</title></circle>'
    )


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if _finite(point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _positive(line: Series, x_log: bool, y_log: bool) -> Series:
    """Without the points and the error bars that a logarithmic axis cannot show."""
    if not (x_log or y_log):
        return line
    points = [
        (px, py) if (px > 0.0 or not x_log) and (py > 0.0 or not y_log) else (math.nan, math.nan)
        for px, py in line.points
    ]
    errors = [
        0.0 if y_log and error >= py else error
        for (_, py), error in zip(line.points, line.errors, strict=False)
    ]
    return replace(line, points=points, errors=errors)


def _thinned(line: Series) -> Series:
    """Average neighbours where there are more points than the picture can show."""
    if len(line.points) <= MAX_POINTS:
        return line
    points = [point for point in line.points if _finite(point)]
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    means = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return Series(line.name, means, line.colour, line.dashed)


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<span class="key c{line.colour}{" dashed" if line.dashed else ""}">'
        f"{escape(line.name)}</span>"
        for line in series
        if line.name
    )
    return f'<div class="legend">{entries}</div>'


def _figure(title: str, legend: str, body: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{body}</figure>"


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
