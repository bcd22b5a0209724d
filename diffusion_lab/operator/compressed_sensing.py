r"""Compressed sensing: fewer numbers than pixels, each a sum of all pixels with random signs.

    Vᵀ x = H D x / √N,    S = mask,

per channel, with N = HW pixels, D random signs and H = H_2 ⊗ ... ⊗ H_2, H_2 = [1 1; 1 -1], the
Walsh-Hadamard matrix, which is symmetric. Without D the seen rows of H would be patterns of a
few frequencies.

Source:
    Do, Gan, Nguyen, Tran, "Fast and efficient compressive sensing using structurally random
    matrices", 2012.
"""

__all__ = ["CompressedSensing", "walsh_hadamard"]

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.operator.base import image_shape
from diffusion_lab.operator.inpainting import Selection, random_mask
from diffusion_lab.rng import KeyedGenerator, make_key


def walsh_hadamard(x: Tensor) -> Tensor:
    """Returns H x / √N over the last axis, whose length N is a power of two, in N log N steps."""
    count, half = x.shape[-1], 1
    while half < count:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return x * count**-0.5


class CompressedSensing(Selection):
    """y is m of the N Walsh-Hadamard coefficients of every channel, of shape (B, C, m).

    Arguments:
        shape: The shape (C, H, W) of one image x_0; HW is a power of two.
        keep: The share m / N of coefficients that are seen, in (0, 1].
        seed: Signs and places are a function of it; at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    signs: Tensor

    def __init__(self, shape: Sequence[int], keep: float = 0.25, seed: int = 0) -> None:
        _, height, width = image_shape(shape, "compressed sensing")
        count = height * width
        if count & (count - 1):
            raise ValueError(
                f"shape={tuple(shape)} is not allowed for compressed sensing: H W = {count} is "
                "not a power of two; set data.size to one: 32, 64, 128, 256"
            )
        super().__init__(shape, random_mask((height, width), keep, seed, "compressed sensing"))
        u = KeyedGenerator(make_key(seed, "signs")[None]).uniform(height, width)[0]
        self.register_buffer("signs", torch.where(u < 0.5, -1.0, 1.0).double(), persistent=False)

    def vt(self, x: Tensor) -> Tensor:
        x = self.signs.to(x) * x
        return walsh_hadamard(x.flatten(-2)).unflatten(-1, self.signs.shape)

    def v(self, c: Tensor) -> Tensor:
        x = walsh_hadamard(c.flatten(-2)).unflatten(-1, self.signs.shape)
        return self.signs.to(x) * x

    def to_image(self, y: Tensor) -> Tensor:
        """Returns Aᵀ y."""
        return self.adjoint(y)
