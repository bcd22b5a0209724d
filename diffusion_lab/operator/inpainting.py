"""Inpainting: the measurement is a subset of the pixels.

The coefficients are the pixels themselves: V = I, S is the mask, and U selects the observed ones.
"""

__all__ = ["BoxInpainting", "Inpainting", "RandomInpainting", "Selection", "random_mask"]

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.constraints import Length, NonNegativeInt, OpenUnit, PositiveUnit, checked
from diffusion_lab.operator.base import SVDOperator, image_shape
from diffusion_lab.rng import KeyedGenerator, make_key


def random_mask(shape: Sequence[int], keep: float, seed: int, name: str) -> Tensor:
    """Returns a mask of `shape` with round(keep N) of its N elements True, at least one.

    Arguments:
        shape: The shape of the mask.
        keep: The fraction of True, in (0, 1].
        seed: The seed, non-negative.
        name: The purpose of the mask; masks of different names are independent.
    """
    count = math.prod(shape)
    generator = KeyedGenerator(make_key(seed, name)[None])
    order = generator.uniform(count, dtype=torch.float64)[0].argsort()
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[: max(1, round(keep * count))]] = True
    return mask.reshape(shape)


class Selection(SVDOperator):
    """y is a subset of the coefficients of an image: S is the mask, U selects them.

    Arguments:
        shape: The shape * of one image x_0.
        mask: True where a coefficient is observed, of shape *; y has shape (B, m) for m observed
            coefficients. For images also of shape (H, W), the same mask for all channels; y then
            has shape (B, C, m).

    Raises:
        ValueError: If the mask has another shape, values other than 0 and 1, or no True element.
    """

    mask: Tensor
    index: Tensor

    def __init__(self, shape: Sequence[int], mask: Tensor) -> None:
        super().__init__(shape)
        mask = torch.as_tensor(mask)
        allowed = [tuple(shape)] + [tuple(shape[1:])] * (len(shape) == 3)
        if tuple(mask.shape) not in allowed:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} is not allowed for images of shape "
                f"{tuple(shape)}; it must be {' or '.join(map(str, allowed))}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError(
                "the mask is not allowed; it must be True (or 1) for observed pixels, at least "
                "one, and False (or 0) for the others"
            )
        self.register_buffer("mask", mask.bool(), persistent=False)
        self.register_buffer("index", mask.flatten().nonzero().squeeze(1), persistent=False)

    @property
    def singular_values(self) -> Tensor:
        return self.mask.double()

    def u(self, c: Tensor) -> Tensor:
        return c.flatten(-self.mask.ndim)[..., self.index]

    def ut(self, y: Tensor) -> Tensor:
        c = y.new_zeros(*y.shape[:-1], self.mask.numel())
        return c.index_copy(-1, self.index, y).reshape(*y.shape[:-1], *self.mask.shape)


class Inpainting(Selection):
    """y is the observed pixels.

    Arguments:
        shape: The shape * of one image x_0, for example (3, 256, 256).
        mask: True where a pixel is observed, see `Selection`.

    Raises:
        ValueError: See `Selection`.
    """

    def vt(self, x: Tensor) -> Tensor:
        return x

    def v(self, c: Tensor) -> Tensor:
        return c

    def to_image(self, y: Tensor) -> Tensor:
        """Returns the observed pixels in their places, and grey (0) elsewhere."""
        return self.ut(y)


class BoxInpainting(Inpainting):
    """y is all pixels outside a rectangular hole.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        fraction: Height and width of the hole, as a fraction of those of the image.
        center: Row and column of the centre of the hole, as fractions of height and width.

    Raises:
        ValueError: If the hole exceeds the image or covers it.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        fraction: OpenUnit = 0.5,
        center: Annotated[Sequence[OpenUnit], Length(2, 2)] = (0.5, 0.5),
    ) -> None:
        _, *sides = image_shape(shape, "inpainting of a box")
        margin = fraction / 2
        if not all(margin - 1e-9 <= middle <= 1 - margin + 1e-9 for middle in center):
            raise ValueError(
                f"center={list(center)} is not allowed with fraction={fraction}: the hole is "
                f"inside the image for numbers from {margin:g} to {1 - margin:g}"
            )
        hole = []
        for side, middle in zip(sides, center, strict=True):
            length = max(1, math.floor(fraction * side + 0.5))
            start = math.floor(middle * side - length / 2 + 0.5)
            start = min(max(start, 0), side - length)
            hole.append(slice(start, start + length))
        mask = torch.ones(sides, dtype=torch.bool)
        mask[hole[0], hole[1]] = False
        if not bool(mask.any()):
            raise ValueError(
                f"fraction={fraction} is not allowed for images of shape {tuple(shape)}: the hole "
                "covers the image; choose a smaller fraction"
            )
        super().__init__(shape, mask)


class RandomInpainting(Inpainting):
    """y is the pixels at random positions, the same for all channels and all images.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        keep: The fraction of pixels that are observed.
        seed: Seed of the positions.
    """

    @checked
    def __init__(
        self, shape: Sequence[int], keep: PositiveUnit = 0.3, seed: NonNegativeInt = 0
    ) -> None:
        _, *sides = image_shape(shape, "random inpainting")
        super().__init__(shape, random_mask(sides, keep, seed, "inpainting"))
