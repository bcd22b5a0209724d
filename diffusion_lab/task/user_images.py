"""One's own images as the truth or the observation, and truths that a prior draws itself."""

__all__ = ["model_pairs", "read_image", "read_observation"]

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.operator import Inpainting, Operator
from diffusion_lab.pixels import to_model
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import Ancestral, State
from diffusion_lab.sampler.time_grid import Grid
from diffusion_lab.schedule import Schedule

HALF = 200  # steps of the chain that draws a model's own truths, above t and below


def read_image(key: str, path: str, shape: tuple[int, ...], resize: bool) -> Tensor:
    """Reads an image, in [-1, 1], float32, of shape (1, 3, H, W).

    Arguments:
        key: The key that names it, for errors.
        path: The file.
        shape: The shape (3, H, W) that is wanted.
        resize: Whether an image of another size is cropped to the middle and scaled.

    Raises:
        ConfigError: If it cannot be read, is not RGB, or has another size.
    """
    channels, height, width = shape
    try:
        with Image.open(Path(path).expanduser()) as file:
            # Phones write pictures lying down, with a tag that says so.
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}={path} does not exist") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}={path} cannot be read as an image: {error}") from error
    if image.mode != "RGB" or channels != 3:
        raise ConfigError(
            f"{key}={path} is an image of mode {image.mode}; the prior is of RGB images. Convert "
            f'it, for example with: python -c "from PIL import Image; '
            f"Image.open('{path}').convert('RGB').save('rgb.png')\""
        )
    if image.size != (width, height):
        if not resize:
            raise ConfigError(
                f"{key}={path} is of {image.width} x {image.height} pixels, {width} x {height} "
                "are wanted; set resize=true to crop it to the middle and scale it"
            )
        side = min(image.width / width, image.height / height)
        box = (side * width, side * height)
        left, top = (image.width - box[0]) / 2, (image.height - box[1]) / 2
        image = image.resize(
            (width, height), Image.Resampling.LANCZOS, (left, top, left + box[0], top + box[1])
        )
    return to_model(torch.from_numpy(np.array(image))[None])


def read_observation(
    path: str, operator: Operator, shape: tuple[int, ...], resize: bool
) -> Tensor:
    """Reads an observation from an image: y itself, or a picture whose seen pixels are y.

    Arguments:
        path: The file.
        operator: The operator.
        shape: The shape (3, H, W) of x_0.
        resize: See `read_image`.

    Raises:
        ConfigError: If the operator's observations are no pictures, or see `read_image`.
    """
    seen = tuple(operator(torch.zeros(1, *shape)).shape[1:])
    if len(seen) == 3 and seen[0] == 3:
        return read_image("observation", path, seen, resize)
    if isinstance(operator, Inpainting):
        return operator(read_image("observation", path, shape, resize))
    raise ConfigError(
        f"observation={path}: what {type(operator).__name__} sees is no picture; give the clean "
        "image instead (image=...), or choose another task"
    )


def model_pairs(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    t: float,
    seed: int,
    index: Tensor,
    clip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draws x_t, and x_0 given x_t, from a prior's own reverse chain.

    For these pairs the prior is right by construction: what is found wrong of a sampler of
    p(x_0 | x_t) is the sampler's, not the network's.

    Arguments:
        denoiser: The prior.
        shape: The shape of one image.
        t: The time t in (0, 1].
        seed: Of the draws.
        index: The images' numbers, of shape (G,).
        clip: Whether the estimates of x_0 above t are clipped to [-1, 1].

    Returns:
        x_t and x_0, of shape (G, *).
    """
    generator = KeyedGenerator(make_key(seed, "model pair", index))
    start = denoiser.schedule.prior((len(index), *shape), generator)
    found: list[Tensor] = []

    def keep(state: State) -> None:
        if state.t == t:
            found.append(state.x_t)

    # A network errs by more than x_0 is large where hardly any image is left: clipped above t.
    upper = Ancestral(HALF + 1, variance="large", grid=_Through(t), clip=clip)
    upper(denoiser, start, generator=generator, callback=keep)
    lower = Ancestral(HALF, variance="large")
    return found[0], lower(denoiser, found[0], t_start=t, generator=generator)


class _Through(Grid):
    """All steps but one from t_start to a time t, and the last from there to 0."""

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        upper = torch.linspace(t_start, self.t, steps, dtype=torch.float64)
        return torch.cat([upper, upper.new_zeros(1)])
