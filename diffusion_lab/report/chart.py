"""Line charts as SVG. Colours and line styles are in the style sheet of the page."""

__all__ = ["LineChart", "chart_html", "chart_svg", "format_scientific"]

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

Point = tuple[float, float]

WIDTH, HEIGHT = 720, 340  # of the view box, which the page scales to its own width
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 50  # margins around the plot area
STYLES = 6  # line styles in the style sheet, s0 to s5
MAX_DOTS = 40  # number of points up to which each point has a dot
MAX_POINTS = 1500  # number of points above which a series is thinned
NAMED = 8  # number of single-point series from which names beside the dots replace the legend
NAME_HEIGHT, CHARACTER_WIDTH = 11.5, 6.2  # size of a name beside a dot
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class LineChart:
    """Line chart of one or several series.

    Arguments:
        title: Heading.
        caption: Description of the chart.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        series: x and y of the points of each series, by its name in the legend. Points that are
            not finite, or not positive on a logarithmic axis, leave a gap and are counted in the
            legend.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        dots: Names of the series that are drawn as dots without a line.
    """

    title: str
    caption: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_x: bool = False
    log_y: bool = False
    dots: Collection[str] = ()


@dataclass(frozen=True)
class _Axis:
    """Axis from `low` to `high` (log10 of the values if `log`) between two pixel positions."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def around(
        cls, values: Sequence[float], log: bool, start: float, end: float, room: float
    ) -> "_Axis":
        """Returns the axis of all values, with a fraction `room` free at each end."""
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-12 * max(abs(low), abs(high)):  # all values are equal
            free = 0.5 if log or low == 0 else abs(low) / 2
        else:
            free = room * (high - low)
        return cls(low - free, high + free, log, start, end)

    def place(self, value: float) -> float:
        """Returns the pixel position of a value."""
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns pixel positions and labels; the labels all have powers of ten, or none has."""
        values = self._tick_values()
        sizes = [abs(value) for value in values if value != 0]
        plain = 1e-3 <= (min(sizes) if self.log else max(sizes)) and max(sizes) < 1e7
        if not plain or (self.log and max(sizes) > 1e4):
            return [(self.place(v), format_scientific(f"{v:.5e}") if v else "0") for v in values]
        decimals = 0 if self.log else max(len(f"{v:.6g}".partition(".")[2]) for v in values)
        texts = [f"{v:.6g}" if self.log else f"{v:,.{decimals}f}" for v in values]
        grouping = "\u202f" if max(sizes) >= 1e4 else ""  # narrow space, as in 10 000
        texts = [text.replace(",", grouping).replace("-", "−") for text in texts]
        return [(self.place(v), text) for v, text in zip(values, texts, strict=True)]

    def _tick_values(self) -> list[float]:
        """Four to eight values as a rule."""
        if not self.log:
            return _round_values(self.low, self.high)
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        decades = [10.0**e for e in range(first, last + 1, max(1, (last - first + 1) // 6))]
        if len(decades) >= 3:
            return decades
        finer = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        margin = 1e-9 * (self.high - self.low)
        finer = [v for v in finer if self.low - margin <= math.log10(v) <= self.high + margin]
        return finer if len(finer) >= 3 else _round_values(10**self.low, 10**self.high)


def chart_html(chart: LineChart) -> str:
    """Returns the chart with its legend, a list, above the drawing.

    Raises:
        ValueError: If x and y of a series differ in length.
    """
    series = _points(chart)
    entries = ""
    for k, (label, points) in enumerate(series.items()):
        lost = points.count(None)
        note = f" <small>({lost} of {len(points)} points cannot be drawn)</small>" if lost else ""
        entries += (
            f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="line s{k % STYLES}" '
            f'd="M1 4L25 4"/></svg><span>{escape(label)}{note}</span></li>'
        )
    legend = "" if _has_names(series) else f'<ul class="legend">{entries}</ul>\n'
    return f'<div class="chart">\n{legend}{chart_svg(chart)}\n</div>'


def chart_svg(chart: LineChart, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Returns the drawing, without a legend: one `svg` element, which is well-formed XML.

    Its elements are `text`, `circle`, and `path` with the commands M, L and h0 alone.

    Arguments:
        chart: The chart.
        width: Width of the view box.
        height: Height of the view box.

    Raises:
        ValueError: If x and y of a series differ in length.
    """
    name = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}")
    shapes = "\n".join(_shapes(chart, width, height))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">\n{shapes}\n</svg>'


def _shapes(chart: LineChart, width: int, height: int) -> Iterator[str]:
    series = _points(chart)
    drawn = [point for points in series.values() for point in points if point is not None]
    if not drawn:
        yield _text(width / 2, height / 2, "There is no point to draw.", "middle")
        return
    x_axis = _Axis.around([x for x, _ in drawn], chart.log_x, LEFT, width - RIGHT, room=0)
    y_axis = _Axis.around([y for _, y in drawn], chart.log_y, height - BOTTOM, TOP, room=0.04)
    yield from _frame(x_axis, y_axis, width, height, chart)
    placed = {
        label: [None if p is None else (x_axis.place(p[0]), y_axis.place(p[1])) for p in points]
        for label, points in series.items()
    }
    if _has_names(series):
        dots = {label: points[0] for label, points in placed.items() if points[0] is not None}
        yield from _named_dots(dots, width)
        return
    for k, (label, points) in enumerate(placed.items()):
        yield from _line(points, f"s{k % STYLES}", label, joined=label not in chart.dots)


def _points(chart: LineChart) -> dict[str, list[Point | None]]:
    """The points of each series; None where an axis has no place for a value."""

    def drawable(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    series: dict[str, list[Point | None]] = {}
    for label, (xs, ys) in chart.series.items():
        if len(xs) != len(ys):
            raise ValueError(f"the series {label!r} has {len(xs)} x for {len(ys)} y")
        series[label] = [
            (x, y) if drawable(x, chart.log_x) and drawable(y, chart.log_y) else None
            for x, y in zip(map(float, xs), map(float, ys), strict=True)
        ]
    return series


def _has_names(series: Mapping[str, Sequence[Point | None]]) -> bool:
    """Whether names beside the dots replace the legend."""
    return len(series) >= NAMED and all(len(points) == 1 for points in series.values())


def _frame(
    x_axis: _Axis, y_axis: _Axis, width: int, height: int, chart: LineChart
) -> Iterator[str]:
    """Grid lines, ticks and names of the axes; the name of the vertical axis is above it."""
    right, bottom = x_axis.end, y_axis.start
    for y, text in y_axis.ticks():
        yield _path([[(LEFT, y), (right, y)]], "grid")
        yield _text(LEFT - 8, y + 4, text, "end")
    for x, text in x_axis.ticks():
        yield _path([[(x, bottom), (x, bottom + 5)]], "axis")
        if right - x > 24:
            yield _text(x, bottom + 20, text, "middle")
        else:  # a long number must not extend over the edge
            yield _text(width, bottom + 20, text, "end")
    yield _path([[(LEFT, bottom), (right, bottom)]], "axis")
    yield _text(0, 14, chart.y_label, "start")
    yield _text(right, height - 6, chart.x_label, "end")


def _line(points: Sequence[Point | None], style: str, label: str, joined: bool) -> Iterator[str]:
    """A line, interrupted where points are missing, and dots if the points are few."""
    pieces = [
        [point for point in run if point is not None]
        for missing, run in groupby(points, lambda p: p is None)
        if not missing
    ]
    if len(points) > MAX_POINTS:
        size = math.ceil(2 * len(points) / MAX_POINTS)
        pieces = [_thin(piece, size) for piece in pieces]
        style += " dense"
    if pieces and joined:
        yield _path(pieces, f"line {style}", label)
    if len(points) <= MAX_DOTS or not joined:
        yield from (_dot(x, y, style) for piece in pieces for x, y in piece)


def _named_dots(dots: Mapping[str, Point], width: int) -> Iterator[str]:
    """A dot with a name for each point; a name that would cover another one moves up."""
    taken: list[tuple[float, float, float]] = []  # left, right and height of each name
    for label, (x, y) in sorted(dots.items(), key=lambda item: -item[1][1]):
        length = CHARACTER_WIDTH * len(label)
        left = x + 6 if x + 6 + length < width else x - 6 - length
        name_y = y
        while any(
            left < end and start < left + length and abs(name_y - other) < NAME_HEIGHT
            for start, end, other in taken
        ):
            name_y -= 1
        taken.append((left, left + length, name_y))
        yield _dot(x, y, "s0")
        if name_y < y - NAME_HEIGHT:
            yield _path([[(x, y), (left, name_y)]], "axis")
        yield _text(left, name_y + 4, label, "start")


def _path(pieces: Sequence[Sequence[Point]], style: str, label: str = "") -> str:
    data = ""
    for piece in pieces:
        data += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in piece)
        data += "h0" if len(piece) == 1 else ""  # one point is drawn as the round end of its line
    title = f"<title>{escape(label)}</title>" if label else ""
    return f'<path class="{style}" d="{data}">{title}</path>'


def _dot(x: float, y: float, style: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _thin(piece: list[Point], size: int) -> list[Point]:
    """Keeps the lowest and the highest of every `size` neighbouring points."""
    thin: list[Point] = []
    for start in range(0, len(piece), size):
        ordered = sorted(range(start, min(start + size, len(piece))), key=lambda i: piece[i][1])
        thin += [piece[i] for i in sorted({ordered[0], ordered[-1]})]
    return thin


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 4), 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def format_scientific(text: str) -> str:
    """Returns a number such as "-1.5e-06" as "−1.5·10⁻⁶"."""
    digits, e, exponent = text.replace("-", "−").partition("e")
    if not e:
        return digits
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    power = "10" + str(int(exponent.replace("−", "-"))).translate(SUPERSCRIPTS)
    return {"1": power, "−1": f"−{power}"}.get(digits, f"{digits}·{power}")
