"""Inpainting: some pixels are seen, the others are not.

The coefficients are the pixels themselves, V = I and S is the mask; U takes the seen ones out.
"""

__all__ = ["BoxInpainting", "Inpainting", "RandomInpainting", "Selection", "random_mask"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.operator.base import SVDOperator, image_shape
from diffusion_lab.rng import KeyedGenerator, make_key


def random_mask(shape: Sequence[int], keep: float, seed: int, name: str) -> Tensor:
    """Returns a mask of `shape` with exactly round(keep N) of its N places True, at least one.

    Arguments:
        shape: The shape of the mask.
        keep: The share of True, in (0, 1].
        seed: The mask is a function of it and of `name`, on any device; at least 0.
        name: What the mask is for.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is not allowed; it is a share above 0 and at most 1")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed} is not allowed; it is a whole number, at least 0")
    count = math.prod(shape)
    generator = KeyedGenerator(make_key(seed, name)[None])
    order = generator.uniform(count, dtype=torch.float64)[0].argsort()
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[: max(1, round(keep * count))]] = True
    return mask.reshape(shape)


class Selection(SVDOperator):
    """y is those coefficients of an image that a mask shows: S is the mask, U takes them out.

    Arguments:
        shape: The shape * of one image x_0.
        mask: True where a coefficient is seen, of shape * or, for images, (H, W): the same for
            all channels. y then has shape (B, m) or (B, C, m), for m of them that are seen.

    Raises:
        ValueError: If the mask has another shape, other values than 0 and 1, or shows nothing.
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
                f"{tuple(shape)}; it is {' or '.join(map(str, allowed))}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
            raise ValueError(
                "the mask is not allowed; it is True (or 1) where a pixel is seen and False "
                "(or 0) elsewhere, and shows at least one"
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
        return c.index_copy(-1, self.index, y).unflatten(-1, self.mask.shape)


class Inpainting(Selection):
    """y is the seen pixels.

    Arguments:
        shape: The shape * of one image x_0, for example (3, 256, 256).
        mask: True where a pixel is seen, of shape (H, W): for all channels, y is (B, C, m); or of
            shape *: y is (B, m).

    Raises:
        ValueError: If the mask has another shape, other values than 0 and 1, or shows nothing.
    """

    def vt(self, x: Tensor) -> Tensor:
        return x

    def v(self, c: Tensor) -> Tensor:
        return c

    def to_image(self, y: Tensor) -> Tensor:
        """Returns the seen pixels in their places, grey (0) elsewhere."""
        return self.ut(y)


class BoxInpainting(Inpainting):
    """y is all but a rectangular hole.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        fraction: Height and width of the hole as a part of the image's, in (0, 1).
        center: The hole's centre as a part of height and of width; the hole lies in the image.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        fraction: float = 0.5,
        center: Sequence[float] = (0.5, 0.5),
    ) -> None:
        _, *sides = image_shape(shape, "inpainting of a box")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction} is not allowed; it is above 0 and below 1")
        if len(center) != 2:
            raise ValueError(f"center={center} is not allowed; it is two numbers in (0, 1)")
        margin = fraction / 2
        if not all(margin - 1e-9 <= middle <= 1 - margin + 1e-9 for middle in center):
            raise ValueError(
                f"center={list(center)} is not allowed with fraction={fraction}: the hole lies in "
                f"the image for numbers from {margin:g} to {1 - margin:g}"
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
                f"fraction={fraction} is not allowed for images of shape {tuple(shape)}: nothing "
                "would be seen; choose a smaller one"
            )
        super().__init__(shape, mask)


class RandomInpainting(Inpainting):
    """y is pixels at random places, the same ones in all channels and of all images.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        keep: The share of pixels that are seen, in (0, 1].
        seed: The places are a function of it; at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, shape: Sequence[int], keep: float = 0.3, seed: int = 0) -> None:
        _, *sides = image_shape(shape, "random inpainting")
        super().__init__(shape, random_mask(sides, keep, seed, "inpainting"))
