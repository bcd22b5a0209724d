"""Image grids: batches with captions, maps of the posterior standard deviation, PNG files.

Images are tensors of shape (N, 3, H, W) with values in [-1, 1], as the models use them, or uint8;
pictures have 8 bits per channel. Values that are not finite raise a ValueError.
"""

__all__ = ["image_grid", "labelled_grid", "save_png", "std_map"]

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.pixels import to_uint8

WHITE = (255, 255, 255)
INK = (40, 42, 48)
FONT_SIZE = 13  # pixels, of captions above images of up to 143 pixels
GAP = 6  # pixels between two images
MARGIN = 10  # pixels around the whole picture
ROW_LABEL_WIDTH = 9  # in font sizes; longer labels are wrapped
MIN_SIDE = 128  # pixels; smaller images are enlarged until their shorter side has as many

# From dark blue over purple and orange to pale yellow. The luminance increases monotonically, so
# that the map is readable in grey.
COLOURS = ["080a2e", "43166a", "8c2963", "d0483c", "f48b22", "fcf5af"]

# Pillow's built-in font has no glyphs for these signs and draws a box instead.
ASCII_SPELLING = {
    **{"α": "alpha", "β": "beta", "γ": "gamma", "ε": "eps", "η": "eta", "θ": "theta"},
    **{"λ": "lambda", "μ": "mu", "σ": "sigma", "τ": "tau", "φ": "phi", "√": "sqrt "},
    **{"×": "x", "²": "^2", "→": "->", "≤": "<=", "≥": ">=", "≈": "~"},
}


def image_grid(images: Tensor, columns: int, pad: int = 2) -> Tensor:
    """Arranges images in rows on white; image k is in row k // columns, column k % columns.

    Arguments:
        images: Images in [-1, 1] or uint8, of shape (N, 3, H, W).
        columns: Number of images in a row; fewer images make a narrower grid.
        pad: Number of white pixels between the images and around the grid.

    Returns:
        The picture, uint8, of shape (3, R (H + pad) + pad, C (W + pad) + pad), on the CPU.

    Raises:
        ValueError: If the shape is different, there is no image, columns < 1 or pad < 0.
    """
    if columns < 1 or pad < 0:
        raise ValueError(f"a grid needs columns >= 1 and pad >= 0, not {columns} and {pad}")
    grid: Tensor = make_grid(_levels(images, "images").cpu(), columns, pad, pad_value=255)
    if len(images) == 1:  # make_grid returns a single image without its border
        grid = torch.nn.functional.pad(grid, [pad] * 4, value=255)
    return grid


def labelled_grid(
    rows: Sequence[Tensor],
    columns: Sequence[str],
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Draws rows of images below the captions of their columns.

    Arguments:
        rows: One tensor per row: images in [-1, 1] or uint8, of shape (C_i, 3, H, W) with the same
            H and W. A row may have fewer images than there are captions.
        columns: Captions above the columns; long captions are wrapped.
        row_labels: Labels left of the rows, or None.
        scale: Integer factor by which pixels are repeated; None takes the smallest factor for
            which the shorter side has at least 128 pixels.

    Returns:
        The picture, RGB, on white.

    Raises:
        ValueError: If there is no row, a row has more images than there are captions, sizes
            differ, or the numbers of labels and rows differ.
    """
    if not rows:
        raise ValueError("a labelled grid needs at least one row")
    tiles = [_levels(row, f"row {i}") for i, row in enumerate(rows)]
    sizes = {tuple(row.shape[2:]) for row in tiles}
    if len(sizes) > 1:
        raise ValueError(f"the rows hold images of different sizes: {sorted(sizes)}")
    longest = max(len(row) for row in tiles)
    if longest > len(columns):
        raise ValueError(f"a row holds {longest} images, but there are {len(columns)} captions")
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} labels for {len(rows)} rows")
    height, width = sizes.pop()
    if scale is None:
        scale = max(1, math.ceil(MIN_SIDE / min(height, width)))
    if scale < 1:
        raise ValueError(f"the scale must be at least 1, not {scale}")
    height, width = height * scale, width * scale

    # Wide pictures are scaled down on a page: larger captions stay legible.
    font_size = max(FONT_SIZE, min(2 * FONT_SIZE, width // 11))
    # A FreeType font, because a size is given.
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(font_size))
    captions = [_wrap(text, font, width) for text in columns]
    labels = [_wrap(text, font, ROW_LABEL_WIDTH * font_size) for text in row_labels or []]
    line = sum(font.getmetrics())
    above = max((line * len(text) for text in captions), default=0) + GAP
    beside = max((_width(text, font) for text in labels), default=-GAP) + GAP
    # A single word can be wider than a small image; the column is widened.
    step = max([width, *(_width(text, font) for text in captions)]) + GAP
    row_step = max([height, *(line * len(text) for text in labels)]) + GAP

    left, top = MARGIN + beside, MARGIN + above
    size = (left + step * len(columns) - GAP + MARGIN, top + row_step * len(rows) - GAP + MARGIN)
    picture = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(picture)
    for j, lines in enumerate(captions):
        place: tuple[float, float] = (left + j * step + width / 2, top - GAP)
        draw.multiline_text(place, "\n".join(lines), INK, font, "md", spacing=2, align="center")
    for i, row in enumerate(tiles):
        if labels:
            place = (left - GAP - 2, top + i * row_step + height / 2)
            text = "\n".join(labels[i])
            draw.multiline_text(place, text, INK, font, "rm", spacing=2, align="right")
        for j, tile in enumerate(row):
            image = _image(tile).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(image, (left + j * step, top + i * row_step))
    return picture


def std_map(std: Tensor, maximum: float | None = None) -> tuple[Tensor, float]:
    """Maps standard deviations to colours, from dark blue (0) to pale yellow (the maximum).

    Arguments:
        std: Posterior standard deviations >= 0 of images in [-1, 1], of shape (N, 3, H, W). The
            mean over the three channels is shown.
        maximum: Standard deviation of the brightest colour, at which larger ones are clipped; None
            takes the largest mean.

    Returns:
        The picture in [-1, 1], float32, of shape (N, 3, H, W), and the maximum, for the caption.
        If all standard deviations are 0, the picture is dark and the maximum is 0.

    Raises:
        ValueError: If a standard deviation is negative or not finite, or the maximum is not > 0.
    """
    _checked(std, "std")
    bad = std.numel() - int((torch.isfinite(std) & (std >= 0)).sum())
    if bad:
        raise ValueError(f"{bad} of {std.numel()} standard deviations are negative or not finite")
    if maximum is not None and not (math.isfinite(maximum) and maximum > 0):
        raise ValueError(f"the maximum must be finite and above 0, not {maximum}")
    mean = std.detach().float().mean(dim=1)
    top = float(mean.max()) if maximum is None else float(maximum)
    level = (mean / top if top > 0 else mean).clamp(0, 1)

    rgb = [list(bytes.fromhex(colour)) for colour in COLOURS]
    anchors = torch.tensor(rgb, dtype=torch.float32, device=std.device) / 127.5 - 1
    place = level * (len(COLOURS) - 1)
    below = place.floor().long().clamp(max=len(COLOURS) - 2)
    part = (place - below)[..., None]
    colour = anchors[below] * (1 - part) + anchors[below + 1] * part
    return colour.movedim(-1, 1).contiguous(), top


def save_png(picture: Tensor | Image.Image, path: Path) -> Path:
    """Writes a picture as a PNG file, atomically, and returns its path.

    Arguments:
        picture: A Pillow image, or a tensor of shape (3, H, W): uint8, or floating point in
            [-1, 1].
        path: The file. Its folder is created if it is missing.

    Raises:
        ValueError: If a tensor has a different shape or values that are not finite.
    """
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else _image(picture)
    image.save(buffer, format="PNG")  # optimize=True is ten times slower for files 1% smaller
    return write_atomic(path, buffer.getvalue())


def _checked(images: Tensor, name: str) -> Tensor:
    """Returns the images if their shape is (N, 3, H, W) and not empty."""
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"{name} must be of shape (N, 3, H, W), not {tuple(images.shape)}")
    return images


def _levels(images: Tensor, name: str) -> Tensor:
    """Returns the grey levels of images (N, 3, H, W), uint8 or in [-1, 1]."""
    images = _checked(images, name)
    return images if images.dtype == torch.uint8 else to_uint8(images)


def _image(picture: Tensor) -> Image.Image:
    """Returns the Pillow image of a tensor (3, H, W), uint8 or in [-1, 1]."""
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture must be of shape (3, H, W), not {tuple(picture.shape)}")
    levels = picture if picture.dtype == torch.uint8 else to_uint8(picture)
    image: Image.Image = to_pil_image(levels.cpu())
    return image


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text at spaces into lines of at most `width` pixels, except for longer words."""
    for sign, word in ASCII_SPELLING.items():
        text = text.replace(sign, word)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def _width(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    """The width of the longest line in pixels."""
    return max(math.ceil(font.getlength(line)) for line in lines)
