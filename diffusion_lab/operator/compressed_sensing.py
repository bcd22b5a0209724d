r"""Compressed sensing: fewer measurements than pixels, each a sum of all pixels with random signs.

    Vᵀ x = H D x / √N,    S = mask,

per channel, with N = HW pixels, D random signs and H = H_2 ⊗ ... ⊗ H_2, H_2 = [1 1; 1 -1], the
symmetric Walsh-Hadamard matrix. The random signs spread every measurement over all frequencies.

Source:
    Do, Gan, Nguyen, Tran, "Fast and efficient compressive sensing using structurally random
    matrices", 2012.
"""

__all__ = ["CompressedSensing", "walsh_hadamard"]

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegativeInt, PositiveUnit, checked
from diffusion_lab.operator.base import image_shape
from diffusion_lab.operator.inpainting import Selection, random_mask
from diffusion_lab.rng import KeyedGenerator, make_key


def walsh_hadamard(x: Tensor) -> Tensor:
    """Returns H x / √N over the last axis, whose length N is a power of two, in N log N steps."""
    count, half = x.shape[-1], 1
    while half < count:
        a, b = x.reshape(*x.shape[:-1], count // (2 * half), 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return x * float(count**-0.5)


class CompressedSensing(Selection):
    """y is m of the N Walsh-Hadamard coefficients of every channel, of shape (B, C, m).

    Arguments:
        shape: The shape (C, H, W) of one image x_0; HW is a power of two.
        keep: The fraction m / N of coefficients that are measured.
        seed: Seed of the signs and of the choice of coefficients.

    Raises:
        ValueError: If HW is not a power of two.
    """

    signs: Tensor

    @checked
    def __init__(
        self, shape: Sequence[int], keep: PositiveUnit = 0.25, seed: NonNegativeInt = 0
    ) -> None:
        _, height, width = image_shape(shape, "compressed sensing")
        count = height * width
        if count & (count - 1):
            raise ValueError(
                f"shape={tuple(shape)} is not allowed for compressed sensing: H W = {count} is "
                "not a power of two; set data.size to 32, 64, 128 or 256"
            )
        super().__init__(shape, random_mask((height, width), keep, seed, "compressed sensing"))
        u = KeyedGenerator(make_key(seed, "signs")[None]).uniform(height, width)[0]
        self.register_buffer("signs", torch.where(u < 0.5, -1.0, 1.0).double(), persistent=False)

    def vt(self, x: Tensor) -> Tensor:
        x = self.signs.to(x) * x
        return walsh_hadamard(x.flatten(-2)).reshape(x.shape)

    def v(self, c: Tensor) -> Tensor:
        x = walsh_hadamard(c.flatten(-2)).reshape(c.shape)
        return self.signs.to(x) * x

    def to_image(self, y: Tensor) -> Tensor:
        """Returns Aᵀ y."""
        return self.adjoint(y)
