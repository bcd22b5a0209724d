"""Line charts: SVG drawn by hand, without a plotting library.

The colours and line styles are in the style sheet of the page that a chart stands in.
"""

__all__ = ["LineChart", "axis_of", "chart", "drawable", "format_scientific", "ticks_of"]

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

Point = tuple[float, float]

WIDTH, HEIGHT = 720, 340  # of a chart's view box; the page scales it to its own width
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 50  # margins around the plot
STYLES = 6  # line styles in the style sheet, s0 to s5
MARKED = 40  # points up to which every one gets a dot
LINE = 11.5  # height of a name beside a dot
NAMED = 8  # dots of one point each from which a legend would be no help: their names stand by them
DENSE = 1500  # points from which a curve is thinned: there are not so many pixels
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class LineChart:
    """A line chart.

    Arguments:
        title: The heading.
        caption: What is drawn.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        series: For every name in the legend the x and the y of its points. Points that are not
            finite, or not positive on a logarithmic axis, leave a gap and are counted in the
            legend.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
    """

    title: str
    caption: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class _Axis:
    """Where values lie between the ends of an axis; on a logarithmic one these are log10."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Returns the place of a value, 0 at the start and 1 at the end."""
        value = math.log10(value) if self.log else value
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Returns the values to be marked, four to eight as a rule."""
        if not self.log:
            return _round_values(self.low, self.high)
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        decades = [10.0**e for e in range(first, last + 1, max(1, (last - first + 1) // 6))]
        if len(decades) >= 3:
            return decades
        finer = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        finer = [v for v in finer if -1e-9 <= self.place(v) <= 1 + 1e-9]
        return finer if len(finer) >= 3 else _round_values(10**self.low, 10**self.high)


def chart(section: LineChart) -> str:
    """Returns the legend as a list and one `svg` element, which is well-formed XML.

    Raises:
        ValueError: If x and y of a series differ in length.
    """
    drawn: dict[str, list[Point | None]] = {}
    legend = ""
    for k, (label, (xs, ys)) in enumerate(section.series.items()):
        if len(xs) != len(ys):
            raise ValueError(f"the series {label!r} has {len(xs)} x for {len(ys)} y")
        kept: list[Point | None] = []
        for x, y in zip(map(float, xs), map(float, ys), strict=True):
            shown = drawable(x, section.log_x) and drawable(y, section.log_y)
            kept.append((x, y) if shown else None)
        drawn[label] = kept
        lost = kept.count(None)
        note = f" <small>({lost} of {len(kept)} points cannot be drawn)</small>" if lost else ""
        legend += (
            f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="line s{k % STYLES}" '
            f'd="M1 4H25"/></svg><span>{escape(label)}{note}</span></li>'
        )
    points = [p for kept in drawn.values() for p in kept if p is not None]
    named = len(drawn) >= NAMED and all(len(kept) == 1 for kept in drawn.values())
    if points:
        x_axis = axis_of([x for x, _ in points], section.log_x, room=0)
        y_axis = axis_of([y for _, y in points], section.log_y, room=0.04)
        parts = list(_frame(x_axis, y_axis, section.x_label, section.y_label))
        if named:
            dots = {label: kept[0] for label, kept in drawn.items() if kept[0] is not None}
            parts += _names({n: _pixel(x_axis, y_axis, p) for n, p in dots.items()})
        for k, (label, kept) in enumerate(({} if named else drawn).items()):
            places = [None if p is None else _pixel(x_axis, y_axis, p) for p in kept]
            parts += _line(places, f"s{k % STYLES}", label)
    else:
        middle = f'x="{WIDTH / 2}" y="{HEIGHT / 2}"'
        parts = [f'<text class="middle" {middle}>There is no point to draw.</text>']
    name = escape(f"{section.title}: {section.y_label} over {section.x_label}")
    drawing = "\n".join(parts)
    legend = "" if named else f'<ul class="legend">{legend}</ul>\n'
    return (
        f'<div class="chart">\n{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">\n{drawing}\n</svg>'
        "\n</div>"
    )


def drawable(value: float, log: bool) -> bool:
    """Whether an axis has a place for the value."""
    return math.isfinite(value) and (value > 0 or not log)


def axis_of(values: Sequence[float], log: bool, room: float) -> _Axis:
    """The axis that holds all values, with a share of its length left free at both ends."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # all the same
        half = 0.5 if log or low == 0 else abs(low) / 2
        return _Axis(low - half, high + half, log)
    free = room * (high - low)
    return _Axis(low - free, high + free, log)


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (5, 2) if (high - low) / (m * step) >= 4), 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def format_scientific(text: str) -> str:
    """Returns a number such as "-1.5e-06" as it is written by hand."""
    digits, e, exponent = text.replace("-", "−").partition("e")
    if not e:
        return digits
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    power = "10" + str(int(exponent.replace("−", "-"))).translate(SUPERSCRIPTS)
    return {"1": power, "−1": f"−{power}"}.get(digits, f"{digits}·{power}")


def ticks_of(axis: _Axis) -> list[tuple[float, str]]:
    """The ticks of an axis with their numbers: all plain or all with powers of ten."""
    ticks = axis.ticks()
    sizes = [abs(value) for value in ticks if value != 0]
    plain = 1e-3 <= (min(sizes) if axis.log else max(sizes)) and max(sizes) < 1e7
    if not plain or (axis.log and max(sizes) > 1e4):
        return [(v, format_scientific(f"{v:.5e}") if v else "0") for v in ticks]
    decimals = 0 if axis.log else max(len(f"{v:.6g}".partition(".")[2]) for v in ticks)
    texts = [f"{v:.6g}" if axis.log else f"{v:,.{decimals}f}" for v in ticks]
    grouping = "\u202f" if max(sizes) >= 1e4 else ""  # a narrow space, as in 10 000
    return [
        (v, t.replace(",", grouping).replace("-", "−")) for v, t in zip(ticks, texts, strict=True)
    ]


def _pixel(x_axis: _Axis, y_axis: _Axis, point: Point) -> Point:
    """The place of a point in the view box."""
    x = LEFT + x_axis.place(point[0]) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - y_axis.place(point[1]) * (HEIGHT - TOP - BOTTOM)
    return x, y


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> Iterator[str]:
    """Grid, numbers and names of the axes; the vertical name lies flat above its axis."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value, text in ticks_of(y_axis):
        y = bottom - y_axis.place(value) * (bottom - TOP)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>'
    for value, text in ticks_of(x_axis):
        x = LEFT + x_axis.place(value) * (right - LEFT)
        yield f'<path class="axis" d="M{x:.1f} {bottom}v5"/>'
        if right - x > 24:
            yield f'<text class="middle" x="{x:.1f}" y="{bottom + 20}">{text}</text>'
        else:  # a long number must not reach over the edge
            yield f'<text class="end" x="{WIDTH}" y="{bottom + 20}">{text}</text>'
    yield f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>'
    yield f'<text x="0" y="14">{escape(y_label)}</text>'
    yield f'<text class="end" x="{right}" y="{HEIGHT - 6}">{escape(x_label)}</text>'


def _line(places: Sequence[Point | None], style: str, label: str) -> Iterator[str]:
    """One line, broken where a point is missing, and dots where the points are few."""
    path, pen = "", "M"
    for place in [*_thin(places), None]:
        if place is not None:
            path += f"{pen}{place[0]:.1f} {place[1]:.1f}"
            alone, pen = pen == "M", "L"
        elif pen == "L":
            path += "h0" if alone else ""  # a lone point shows as the round end of its line
            pen = "M"
    if path:
        style += " dense" if len(places) > DENSE else ""
        yield f'<path class="line {style}" d="{path}"><title>{escape(label)}</title></path>'
    if len(places) <= MARKED:
        for x, y in filter(None, places):
            yield f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'


def _names(dots: Mapping[str, Point]) -> Iterator[str]:
    """A dot for each name, and the name beside it, moved up where another one is in the way."""
    taken: list[tuple[float, float, float]] = []  # left, right and height of each name
    for label, (x, y) in sorted(dots.items(), key=lambda item: -item[1][1]):
        width = 6.2 * len(label)
        left = x + 6 if x + 6 + width < WIDTH else x - 6 - width
        height = y
        while any(
            left < end and start < left + width and abs(height - other) < LINE
            for start, end, other in taken
        ):
            height -= 1
        taken.append((left, left + width, height))
        yield f'<circle class="dot s0" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
        if height < y - LINE:
            yield f'<path class="axis" d="M{x:.1f} {y:.1f}L{left:.1f} {height:.1f}"/>'
        yield f'<text x="{left:.1f}" y="{height + 4:.1f}">{escape(label)}</text>'


def _thin(places: Sequence[Point | None]) -> Sequence[Point | None]:
    """Leaves of a dense curve the lowest and the highest point of every short stretch."""
    if len(places) <= DENSE:
        return places
    size = math.ceil(2 * len(places) / DENSE)
    thin: list[Point | None] = []
    for missing, group in groupby(places, key=lambda place: place is None):
        if missing:
            thin.append(None)
            continue
        run = list(group)
        for start in range(0, len(run), size):
            ordered = sorted(range(start, min(start + size, len(run))), key=lambda i: run[i][1])
            thin += [run[i] for i in sorted({ordered[0], ordered[-1]})]
    return thin
