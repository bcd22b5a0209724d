"""Line charts as PNG pictures, for dashboards and folders: their SVG drawings by Pillow."""

__all__ = ["chart_png"]

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

from diffusion_lab.report.chart import LEFT, SUPERSCRIPTS, LineChart, chart_svg
from diffusion_lab.report.image_grid import ASCII_SPELLING, FONT_SIZE, INK, WHITE

WIDTH, HEIGHT = 480, 330  # of a chart
HEADER = 44  # height of the title and the legend
SCALE = 2  # supersampling factor, for smooth lines
COLOURS = ["#2b5f95", "#c2571f", "#2f7d5b", "#8a4597", "#97740f", "#6b6f78"]  # as in the page
GRID = "#dee0e4"
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}

# Pillow's built-in font has neither superscripts nor these signs.
DIGITS = {chr(raised): chr(digit) for digit, raised in SUPERSCRIPTS.items()}
SIGNS = {**ASCII_SPELLING, "−": "-", "\u202f": " "}


def chart_png(charts: Sequence[LineChart]) -> Image.Image:
    """Draws charts side by side.

    Raises:
        ValueError: If there is no chart, or x and y of a series differ in length.
    """
    if not charts:
        raise ValueError("there is no chart to draw")
    picture = Image.new("RGB", (WIDTH * len(charts), HEIGHT), WHITE)
    for k, chart in enumerate(charts):
        picture.paste(_draw(chart), (k * WIDTH, 0))
    return picture


def _draw(chart: LineChart) -> Image.Image:
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WHITE)
    pen = ImageDraw.Draw(picture)
    font, bold = (ImageFont.load_default(SCALE * size) for size in (FONT_SIZE - 1, FONT_SIZE))
    pen.text((SCALE * LEFT, SCALE * 8), _ascii(chart.title), INK, bold, "la")
    left: float = SCALE * LEFT
    for label, colour in zip(chart.series, COLOURS, strict=False):
        pen.text((left, SCALE * 32), _ascii(label), colour, font, "la")
        left += pen.textlength(_ascii(label), font) + SCALE * 18

    def at(x: str, y: str) -> tuple[float, float]:
        return SCALE * float(x), SCALE * (float(y) + HEADER)

    for shape in ElementTree.fromstring(chart_svg(chart, WIDTH, HEIGHT - HEADER)):
        style = shape.get("class", "").split()
        if shape.tag == "text":
            place = at(shape.get("x", ""), shape.get("y", ""))
            pen.text(place, _ascii(shape.text or ""), INK, font, ANCHORS[style[0]])
            continue
        series = int(style[1][1:]) if len(style) > 1 else 0
        if shape.tag == "circle":
            place = at(shape.get("cx", ""), shape.get("cy", ""))
            pen.circle(place, 3 * SCALE, fill=COLOURS[series])
            continue
        width, ink = SCALE, GRID if style[0] == "grid" else INK
        if style[0] == "line":  # a later line must not hide an earlier one
            width, ink = 2 * SCALE * max(1, len(chart.series) - series), COLOURS[series]
        for piece in shape.get("d", "").split("M")[1:]:
            points = [at(*numbers) for numbers in re.findall(r"(-?[\d.]+) (-?[\d.]+)", piece)]
            pen.line(points, ink, width, joint="curve")
    return picture.reduce(SCALE)


def _ascii(text: str) -> str:
    """Returns a text in signs that the font has: 10⁻³ as 10^-3, σ as sigma."""
    result, raised = "", False
    for sign in text:
        if sign in DIGITS and not raised:
            result += "^"
        raised = sign in DIGITS
        result += DIGITS.get(sign) or SIGNS.get(sign, sign)
    return result
