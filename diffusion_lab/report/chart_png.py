"""Line charts as pictures, for dashboards and folders: those of `chart`, drawn with Pillow."""

__all__ = ["draw"]

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from diffusion_lab.report.chart import SUPERSCRIPTS, LineChart, axis_of, drawable, ticks_of
from diffusion_lab.report.image_grid import ASCII_SPELLING, FONT_SIZE, INK, WHITE

WIDTH, HEIGHT = 480, 330  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 62, 44  # margins around the plot
FINE = 2  # drawn so many times larger, for smooth lines
FEW = 20  # points up to which a series is dots
RULE = (222, 224, 228)
COLOURS = [(31, 111, 180), (214, 102, 22), (44, 140, 80), (160, 70, 150)]

# Pillow's own font lacks all of these.
LOWERED = {chr(raised): chr(digit) for digit, raised in SUPERSCRIPTS.items()}
SIGNS = {**ASCII_SPELLING, "−": "-", "\u202f": " "}


def draw(curves: Sequence[LineChart]) -> Image.Image:
    """Draws charts side by side.

    Points that an axis has no place for are left out.

    Raises:
        ValueError: If there is no chart.
    """
    if not curves:
        raise ValueError("there is no chart to draw")
    picture = Image.new("RGB", (WIDTH * len(curves), HEIGHT), WHITE)
    for k, curve in enumerate(curves):
        picture.paste(_draw(curve), (k * WIDTH, 0))
    return picture


def _draw(curve: LineChart) -> Image.Image:
    picture = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), WHITE)
    pen = ImageDraw.Draw(picture)
    font, bold = (ImageFont.load_default(FINE * size) for size in (FONT_SIZE - 1, FONT_SIZE))

    def write(x: float, y: float, text: str, anchor: str, fill: tuple = INK) -> None:
        pen.text((FINE * x, FINE * y), _spelled(text), fill, font, anchor)

    shown = {
        label: [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)
                if drawable(float(x), curve.log_x) and drawable(float(y), curve.log_y)]
        for label, (xs, ys) in curve.series.items()
    }  # fmt: skip
    points = [point for each in shown.values() for point in each]
    pen.text((FINE * LEFT, FINE * 8), _spelled(curve.title), INK, bold, "la")
    if not points:
        write(WIDTH / 2, HEIGHT / 2, "There is no point to draw.", "mm")
        return picture.reduce(FINE)
    x_axis = axis_of([x for x, _ in points], curve.log_x, room=0)
    y_axis = axis_of([y for _, y in points], curve.log_y, room=0.04)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        """The place of a point in the large picture."""
        across = LEFT + x_axis.place(x) * (right - LEFT)
        return FINE * across, FINE * (bottom - y_axis.place(y) * (bottom - TOP))

    for value, text in ticks_of(y_axis):
        y = bottom - y_axis.place(value) * (bottom - TOP)
        pen.line([(FINE * LEFT, FINE * y), (FINE * right, FINE * y)], RULE, FINE)
        write(LEFT - 6, y, text, "rm")
    for value, text in ticks_of(x_axis):
        x = LEFT + x_axis.place(value) * (right - LEFT)
        pen.line([(FINE * x, FINE * bottom), (FINE * x, FINE * (bottom + 4))], INK, FINE)
        write(x, bottom + 8, text, "mt")
    pen.line([(FINE * LEFT, FINE * bottom), (FINE * right, FINE * bottom)], INK, FINE)
    write(right, HEIGHT - 4, curve.x_label, "rb")
    start = LEFT
    for k, (label, each) in enumerate(shown.items()):
        colour = COLOURS[k % len(COLOURS)]
        write(start, 32, label, "la", colour)
        start += pen.textlength(_spelled(label), font) / FINE + 18
        places = [place(x, y) for x, y in each]
        if len(places) > FEW:
            wide = 2 * (len(shown) - k)  # a later line must not hide one below it
            pen.line(places, colour, FINE * wide, joint="curve")
        else:
            for centre in places:
                pen.circle(centre, 4 * FINE, fill=colour)
    return picture.reduce(FINE)


def _spelled(text: str) -> str:
    """A text in signs that the font has: 10⁻³ as 10^-3, σ as sigma."""
    result, raised = "", False
    for sign in text:
        if sign in LOWERED and not raised:
            result += "^"
        raised = sign in LOWERED
        result += LOWERED.get(sign) or SIGNS.get(sign, sign)
    return result
