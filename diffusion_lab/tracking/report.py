"""The report of a run: one HTML page that stands alone and can be sent by mail.

Style, script and pictures are inside the file; it opens without a network and refuses to fetch
anything (its content security policy allows `data:` pictures alone). Everything that callers hand
in is text: it is escaped, so that a title may hold `<`, `&` or quotes.
"""

__all__ = ["Config", "Curve", "Facts", "Picture", "Section", "Table", "write_report"]

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import groupby
from pathlib import Path
from string import Template

from diffusion_lab.files import write_atomic

Cell = str | float | int
Point = tuple[float, float]

PNG = b"\x89PNG\r\n\x1a\n"
INLINE = 560  # pixels, the width to which a small picture is enlarged by a whole factor at most
NUMBER = re.compile(
    r"([-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(?:±.*|%)?"
)  # 27.3, 27.3 ± 0.1, 5 %
ABSENT = {"", "-", "–", "—", "n/a"}  # may stand in a column of numbers

WIDTH, HEIGHT = 720, 340  # of a chart's view box; the page scales it to its own width
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 50  # margins around the plot
STYLES = 6  # line styles in the style sheet, s0 to s5
MARKED = 40  # points up to which every one gets a dot
DENSE = 1500  # points from which a curve is thinned: there are not so many pixels
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Picture:
    """A PNG file, embedded byte for byte.

    Arguments:
        title: The heading.
        caption: What is seen.
        path: The PNG file.
    """

    title: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Table:
    """A table whose columns sort on a click.

    Arguments:
        title: The heading.
        caption: What the numbers are, with their units.
        columns: The headers.
        rows: The cells, a row as long as `columns`. Numbers are printed with four significant
            digits; a string is printed as it is, and counts as a number if it looks like
            "27.3", "27.3 ± 0.1" or "5 %".
    """

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Curve:
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
class Facts:
    """A list of names and what they stand for: settings, noise levels, versions.

    Arguments:
        title: The heading.
        items: The values by name.
    """

    title: str
    items: Mapping[str, str]


@dataclass(frozen=True)
class Config:
    """A long text, folded until it is asked for.

    Arguments:
        title: The heading.
        text: The text, YAML as a rule; its lines are kept.
    """

    title: str
    text: str


Section = Picture | Table | Curve | Facts | Config


def write_report(path: Path, title: str, summary: str, sections: Sequence[Section]) -> Path:
    """Writes the page; the same content gives the same bytes.

    Arguments:
        path: The HTML file; an old one is replaced as a whole.
        title: The title of the page.
        summary: Its first paragraphs, plain text; an empty line starts a new one.
        sections: What follows, in this order. Pictures and curves are numbered as figures.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If a picture does not exist.
        TypeError: If a section is of no known kind.
        ValueError: If a picture is no PNG file, a row of a table is not as long as its header, or
            x and y of a curve differ in length. Nothing is written then.
    """
    used: set[str] = set()
    figures = tables = 0
    contents, bodies = [], []
    for section in sections:
        anchor = _anchor(section.title, used)
        heading = escape(section.title)
        if isinstance(section, Picture | Curve):
            figures += 1
            number = f"Figure {figures}"
        else:
            tables += isinstance(section, Table)
            number = f"Table {tables}"
        contents.append(f'<li><a href="#{anchor}">{heading}</a></li>')
        bodies.append(
            f'<section id="{anchor}">\n<h2><a href="#{anchor}">{heading}</a></h2>\n'
            f"{_body(section, number)}\n</section>"
        )
    paragraphs = [text.strip() for text in re.split(r"\n\s*\n", summary) if text.strip()]
    template = resources.files(__package__).joinpath("report_template.html")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        summary="\n".join(f'<p class="summary">{escape(text)}</p>' for text in paragraphs),
        contents="\n".join(contents),
        sections="\n".join(bodies),
    )
    return write_atomic(path, page.encode("utf-8"))


def _body(section: Section, number: str) -> str:
    """The HTML below the heading of a section."""
    if isinstance(section, Picture):
        return _picture(section, number)
    if isinstance(section, Table):
        return _table(section, number)
    if isinstance(section, Curve):
        return _curve(section, number)
    if isinstance(section, Facts):
        items = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in section.items.items())
        return "<dl>\n" + "\n".join(items) + "\n</dl>"
    if isinstance(section, Config):
        lines = len(section.text.splitlines())
        return (
            f"<details>\n<summary>{lines} lines</summary>\n"
            f'<pre tabindex="0">\n{escape(section.text)}</pre>\n</details>'
        )
    raise TypeError(f"a report has no section of the kind {type(section).__name__}")


def _caption(number: str, text: str) -> str:
    """The inside of a caption from its class on: both `figcaption` and `p` carry it."""
    return f'class="caption"><b>{number}</b>{escape(text)}'


def _picture(section: Picture, number: str) -> str:
    """A picture as a button that enlarges it."""
    data = Path(section.path).read_bytes()
    if not data.startswith(PNG):
        raise ValueError(f"{section.path} is no PNG file")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    factor = max(1, min(4, INLINE // width))
    pixels = ' class="pixels"' if factor > 1 else ""
    alt = escape(f"{section.title}: {section.caption}" if section.caption else section.title)
    code = base64.b64encode(data).decode("ascii")
    return (
        f'<figure>\n<button type="button" class="picture" title="Enlarge">'
        f'<img{pixels} alt="{alt}" width="{width * factor}" height="{height * factor}" '
        f'src="data:image/png;base64,{code}">'
        f"</button>\n<figcaption {_caption(number, section.caption)}</figcaption>\n</figure>"
    )


def _table(section: Table, number: str) -> str:
    """A table; its columns of numbers are marked, and their cells carry the value to sort by."""
    for i, row in enumerate(section.rows):
        if len(row) != len(section.columns):
            raise ValueError(
                f"row {i} of the table {section.title!r} has {len(row)} cells for "
                f"{len(section.columns)} columns"
            )
    head = ""
    cells: list[list[str]] = [[] for _ in section.rows]
    for j, name in enumerate(section.columns):
        column = [row[j] for row in section.rows]
        values = [_value(cell) for cell in column]
        plain = [
            v is None and str(c).strip() not in ABSENT for c, v in zip(column, values, strict=True)
        ]
        numeric = not any(plain) and any(v is not None for v in values)
        mark = ' class="number"' if numeric else ""
        head += f'<th scope="col"{mark}><button type="button">{escape(name)}</button></th>'
        for i, (text, value) in enumerate(zip(_texts(column), values, strict=True)):
            key = ""
            if numeric and value is not None and not math.isnan(value):
                key = f' data-value="{value!r}"'.replace("inf", "Infinity")
            cells[i].append(f"<td{mark}{key}>{escape(text)}</td>")
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return (
        f'<div class="scroll" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>\n"
        f"<p {_caption(number, section.caption)}</p>"
    )


def _value(cell: Cell) -> float | None:
    """The number in a cell, or None."""
    if not isinstance(cell, str):
        return None if isinstance(cell, bool) else float(cell)
    match = NUMBER.fullmatch(cell.strip())
    return float(match[1].replace("−", "-")) if match else None


def _texts(column: Sequence[Cell]) -> list[str]:
    """The cells as printed: the floats of a column share their decimals, so that points align."""
    short = {f"{cell:.4g}" for cell in column if isinstance(cell, float) and math.isfinite(cell)}
    aligned = not any("e" in text for text in short)
    decimals = max((len(text.partition(".")[2]) for text in short), default=0)
    texts = []
    for cell in column:
        if isinstance(cell, float):
            cell = _power(f"{cell:.{decimals}f}" if aligned else f"{cell:.4g}")
        texts.append(str(cell))
    return texts


def _anchor(title: str, used: set[str]) -> str:
    """A name for the address bar, not yet used on the page."""
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    anchor, n = stem, 1
    while anchor in used or anchor == "zoom":
        n += 1
        anchor = f"{stem}-{n}"
    used.add(anchor)
    return anchor


# Line charts: SVG drawn by hand, without a plotting library; the colours are in the style sheet.


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


def _curve(section: Curve, number: str) -> str:
    """A chart: its legend as a list and one `svg` element, which is well-formed XML."""
    drawn: dict[str, list[Point | None]] = {}
    legend = ""
    for k, (label, (xs, ys)) in enumerate(section.series.items()):
        if len(xs) != len(ys):
            raise ValueError(f"the series {label!r} has {len(xs)} x for {len(ys)} y")
        kept: list[Point | None] = []
        for x, y in zip(map(float, xs), map(float, ys), strict=True):
            shown = _shown(x, section.log_x) and _shown(y, section.log_y)
            kept.append((x, y) if shown else None)
        drawn[label] = kept
        lost = kept.count(None)
        note = f" <small>({lost} of {len(kept)} points cannot be drawn)</small>" if lost else ""
        legend += (
            f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="line s{k % STYLES}" '
            f'd="M1 4H25"/></svg><span>{escape(label)}{note}</span></li>'
        )
    points = [p for kept in drawn.values() for p in kept if p is not None]
    if points:
        x_axis = _axis([x for x, _ in points], section.log_x, room=0)
        y_axis = _axis([y for _, y in points], section.log_y, room=0.04)
        parts = list(_frame(x_axis, y_axis, section.x_label, section.y_label))
        for k, (label, kept) in enumerate(drawn.items()):
            places = [None if p is None else _pixel(x_axis, y_axis, p) for p in kept]
            parts += _line(places, f"s{k % STYLES}", label)
    else:
        middle = f'x="{WIDTH / 2}" y="{HEIGHT / 2}"'
        parts = [f'<text class="middle" {middle}>There is no point to draw.</text>']
    name = escape(f"{section.title}: {section.y_label} over {section.x_label}")
    drawing = "\n".join(parts)
    return (
        f'<figure>\n<div class="chart">\n<ul class="legend">{legend}</ul>\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">\n{drawing}\n</svg>'
        f"\n</div>\n<figcaption {_caption(number, section.caption)}</figcaption>\n</figure>"
    )


def _shown(value: float, log: bool) -> bool:
    """Whether an axis has a place for the value."""
    return math.isfinite(value) and (value > 0 or not log)


def _axis(values: Sequence[float], log: bool, room: float) -> _Axis:
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


def _power(text: str) -> str:
    """A number such as "-1.5e-06" as it is written by hand."""
    digits, e, exponent = text.replace("-", "−").partition("e")
    if not e:
        return digits
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    power = "10" + str(int(exponent.replace("−", "-"))).translate(RAISED)
    return {"1": power, "−1": f"−{power}"}.get(digits, f"{digits}·{power}")


def _numbers(axis: _Axis) -> list[tuple[float, str]]:
    """The ticks of an axis with their numbers: all plain or all with powers of ten."""
    ticks = axis.ticks()
    sizes = [abs(value) for value in ticks if value != 0]
    plain = 1e-3 <= (min(sizes) if axis.log else max(sizes)) and max(sizes) < 1e7
    if not plain or (axis.log and max(sizes) > 1e4):
        return [(v, _power(f"{v:.5e}") if v else "0") for v in ticks]
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
    for value, text in _numbers(y_axis):
        y = bottom - y_axis.place(value) * (bottom - TOP)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>'
    for value, text in _numbers(x_axis):
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
