"""Images and observations given by the user as files."""

__all__ = ["read_image", "read_observation"]

import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.operator import Inpainting, Operator
from diffusion_lab.pixels import to_model


def read_image(key: str, path: str, shape: tuple[int, ...], resize: bool) -> Tensor:
    """Reads an image, in [-1, 1], float32, of shape (1, 3, H, W).

    Arguments:
        key: The configuration key of the file, for error messages.
        path: The file.
        shape: The required shape (3, H, W).
        resize: Whether an image of another size is cropped to the middle and scaled.

    Raises:
        ConfigError: If it cannot be read, is not RGB, or has another size.
    """
    channels, height, width = shape
    try:
        with Image.open(Path(path).expanduser()) as file:
            # Phones store the pixels of the sensor and the orientation as a tag.
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}={path} does not exist") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}={path} cannot be read as an image: {error}") from error
    if image.mode != "RGB" or channels != 3:
        raise ConfigError(
            f"{key}={path} is an image of mode {image.mode}; the prior is of RGB images. "
            + _conversion(image, path)
        )
    if image.size != (width, height):
        if not resize:
            raise ConfigError(
                f"{key}={path} has {image.width} x {image.height} pixels; the prior needs "
                f"{width} x {height}. Set resize=true to crop it to the middle and scale it"
            )
        side = min(image.width / width, image.height / height)
        box = (side * width, side * height)
        left, top = (image.width - box[0]) / 2, (image.height - box[1]) / 2
        image = image.resize(
            (width, height), Image.Resampling.LANCZOS, (left, top, left + box[0], top + box[1])
        )
    return to_model(torch.from_numpy(np.array(image))[None])


def _conversion(image: Image.Image, path: str) -> str:
    """How to make an 8-bit RGB image of one of another mode."""
    if image.mode.startswith(("I", "F")):  # Pillow clips these to white
        return "Scale its values to 0 ... 255 and save it as 8-bit RGB"
    if image.has_transparency_data:  # Pillow drops the transparency: often to black
        return "Put it on a background and save it as RGB"
    program = "import sys; from PIL import Image; "
    program += "Image.open(sys.argv[1]).convert('RGB').save('rgb.png')"
    return f"Convert it, for example with: {shlex.join(['python', '-c', program, path])}"


def read_observation(
    path: str, operator: Operator, shape: tuple[int, ...], resize: bool
) -> Tensor:
    """Reads y from an image file.

    The file holds y itself, or for inpainting an image whose observed pixels are y.

    Arguments:
        path: The file.
        operator: The operator.
        shape: The shape (3, H, W) of x_0.
        resize: Whether an image of another size is cropped to the middle and scaled.

    Raises:
        ConfigError: If the observations of the operator are not RGB images, or the file cannot be
            used, see `read_image`.
    """
    observed = tuple(operator(torch.zeros(1, *shape)).shape[1:])
    if len(observed) == 3 and observed[0] == 3:
        return read_image("observation", path, observed, resize)
    if isinstance(operator, Inpainting):
        y: Tensor = operator(read_image("observation", path, shape, resize))
        return y
    raise ConfigError(
        f"observation={path}: the observations of {type(operator).__name__} are not RGB images; "
        "give the clean image instead (image=...), or choose another operator"
    )
