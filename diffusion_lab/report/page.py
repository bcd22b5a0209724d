"""HTML report: one self-contained page, made of sections.

Style, script and pictures are inside the file. It needs no network, and its content security
policy allows only `data:` pictures. All texts are escaped: a title may contain `<`, `&` or quotes.
"""

__all__ = [
    "Animation",
    "ConfigSection",
    "KeyValueSection",
    "LineChart",
    "Picture",
    "Section",
    "Table",
    "write_report",
]  # fmt: skip

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.redact import mask
from diffusion_lab.report.chart import LineChart, chart_html, format_scientific

Cell = str | float | int

PNG = b"\x89PNG\r\n\x1a\n"
MAX_PNG_BYTES = 100_000  # of an animation frame; larger frames are stored as WebP
MAX_INLINE_WIDTH = 560  # pixels, up to which a small picture is enlarged by an integer factor
# 27.3, 27.3 ± 0.1, 5 %
NUMBER = re.compile(r"([-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(?:±.*|%)?")
MISSING = {"", "-", "–", "—", "n/a"}  # cells without a value in a column of numbers


@dataclass(frozen=True)
class Picture:
    """Section with a PNG file, embedded byte for byte.

    Arguments:
        title: Heading.
        caption: Description of the picture.
        path: The PNG file.
    """

    title: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Animation:
    """Section with a sequence of pictures, a slider and a button that plays them.

    The last picture is shown first, and if scripts are disabled.

    Arguments:
        title: Heading.
        caption: Description of the picture.
        frames: Label and picture of each frame.
    """

    title: str
    caption: str
    frames: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class Table:
    """Section with a table, which a click on a header sorts by its column.

    Arguments:
        title: Heading.
        caption: Description of the numbers, with their units.
        columns: Headers.
        rows: Rows as long as `columns`. Numbers are printed with four significant digits.
            A string is printed unchanged, and sorted as a number if it looks like
            "27.3", "27.3 ± 0.1" or "5 %".
    """

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class KeyValueSection:
    """Section with names and their values: settings, noise levels, versions.

    Arguments:
        title: Heading.
        items: Values by name.
    """

    title: str
    items: Mapping[str, str]


@dataclass(frozen=True)
class ConfigSection:
    """Section with a long text, folded at first.

    Arguments:
        title: Heading.
        text: Text, usually YAML; line breaks are kept.
    """

    title: str
    text: str


Section = Picture | Animation | Table | LineChart | KeyValueSection | ConfigSection


def write_report(path: Path, title: str, summary: str, sections: Sequence[Section]) -> Path:
    """Writes a report and returns its path; equal arguments give equal bytes.

    Secrets in addresses are masked.

    Arguments:
        path: The HTML file; an old one is replaced atomically.
        title: Title of the page.
        summary: First paragraphs, plain text, separated by empty lines.
        sections: Sections, in order. Pictures, animations and charts are numbered as figures.

    Raises:
        FileNotFoundError: If a picture does not exist.
        TypeError: If a section has an unknown type.
        ValueError: If a picture is not a PNG file, an animation has no frame, a row of a table and
            its header differ in length, or x and y of a series differ in length.

    After an error the old file is unchanged.
    """
    used: set[str] = set()
    figures = tables = 0
    contents, bodies = [], []
    for section in sections:
        anchor = _anchor(section.title, used)
        heading = escape(section.title)
        if isinstance(section, Picture | Animation | LineChart):
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
    return write_atomic(path, mask(page).encode("utf-8"))


def _body(section: Section, number: str) -> str:
    """The HTML below the heading of a section."""
    if isinstance(section, Picture):
        return _picture(section, number)
    if isinstance(section, Animation):
        return _animation(section, number)
    if isinstance(section, Table):
        return _table(section, number)
    if isinstance(section, LineChart):
        caption = f"<figcaption {_caption(number, section.caption)}</figcaption>"
        return f"<figure>\n{chart_html(section)}\n{caption}\n</figure>"
    if isinstance(section, KeyValueSection):
        items = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in section.items.items())
        return "<dl>\n" + "\n".join(items) + "\n</dl>"
    if isinstance(section, ConfigSection):
        lines = len(section.text.splitlines())
        return (
            f"<details>\n<summary>{lines} lines</summary>\n"
            f'<pre tabindex="0">\n{escape(section.text)}</pre>\n</details>'
        )
    raise TypeError(f"{type(section).__name__} is not a section of a report")


def _caption(number: str, text: str) -> str:
    """A caption from its class attribute on, for `figcaption` and `p`."""
    return f'class="caption"><b>{number}</b>{escape(text)}'


def _picture(section: Picture, number: str) -> str:
    """A picture as a button that enlarges it."""
    data = Path(section.path).read_bytes()
    if not data.startswith(PNG):
        raise ValueError(f"{section.path} is not a PNG file")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    alt = f"{section.title}: {section.caption}" if section.caption else section.title
    image = _image(alt, width, height, "png", data)
    return (
        f'<figure>\n<button type="button" class="picture" title="Enlarge">{image}</button>\n'
        f"<figcaption {_caption(number, section.caption)}</figcaption>\n</figure>"
    )


def _image(alt: str, width: int, height: int, kind: str, data: bytes, more: str = "") -> str:
    """The element of an image; a small one is enlarged by an integer factor."""
    factor = max(1, min(4, MAX_INLINE_WIDTH // width))
    pixels = ' class="pixels"' if factor > 1 else ""
    code = base64.b64encode(data).decode("ascii")
    return (
        f'<img{pixels} alt="{escape(alt)}" width="{width * factor}" height="{height * factor}" '
        f'{more}src="data:image/{kind};base64,{code}">'
    )


def _animation(section: Animation, number: str) -> str:
    """All frames of an animation; the script shows one of them."""
    last = len(section.frames) - 1
    if last < 0:
        raise ValueError(f"the animation {section.title!r} has no frame")
    images = []
    for k, (label, frame) in enumerate(section.frames):
        kind, data = _encoded(frame)
        more = f'data-label="{escape(label)}" ' + ("" if k == last else "hidden ")
        images.append(_image(f"{section.title}: {label}", *frame.size, kind, data, more))
    title, label = escape(section.title), escape(section.frames[last][0])
    pictures = "\n".join(images)
    return (
        f'<figure class="film">\n<button type="button" class="picture" title="Enlarge">\n'
        f'{pictures}</button>\n<div class="player"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{title}">'
        f"<output>{label}</output></div>\n"
        f"<figcaption {_caption(number, section.caption)}</figcaption>\n</figure>"
    )


def _encoded(image: Image.Image) -> tuple[str, bytes]:
    """A frame as PNG, or as visually lossless WebP if it is large."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")  # optimize=True is ten times slower for files 1% smaller
    if buffer.tell() <= MAX_PNG_BYTES:
        return "png", buffer.getvalue()
    buffer = io.BytesIO()
    image.save(buffer, format="WebP", quality=90)
    return "webp", buffer.getvalue()


def _table(section: Table, number: str) -> str:
    """A table; cells of numeric columns have the value to sort by as an attribute."""
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
            v is None and str(c).strip() not in MISSING
            for c, v in zip(column, values, strict=True)
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
    """The number in a cell, or None if it is not one."""
    if not isinstance(cell, str):
        return None if isinstance(cell, bool) else float(cell)
    match = NUMBER.fullmatch(cell.strip())
    return float(match[1].replace("−", "-")) if match else None


def _texts(column: Sequence[Cell]) -> list[str]:
    """The printed cells; all floats of a column have the same number of decimals."""
    short = {f"{cell:.4g}" for cell in column if isinstance(cell, float) and math.isfinite(cell)}
    aligned = not any("e" in text for text in short)
    decimals = max((len(text.partition(".")[2]) for text in short), default=0)
    texts = []
    for cell in column:
        if isinstance(cell, float):
            cell = format_scientific(f"{cell:.{decimals}f}" if aligned else f"{cell:.4g}")
        texts.append(str(cell))
    return texts


def _anchor(title: str, used: set[str]) -> str:
    """A fragment identifier that is unique on the page."""
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    anchor, n = stem, 1
    while anchor in used or anchor == "zoom":
        n += 1
        anchor = f"{stem}-{n}"
    used.add(anchor)
    return anchor
