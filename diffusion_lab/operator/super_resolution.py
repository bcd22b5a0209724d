"""Super-resolution: the measurement is the image at a lower resolution."""

__all__ = ["AveragePool", "Bicubic"]

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.operator.base import image_shape
from diffusion_lab.operator.separable import Separable


class _Downscale(Separable):
    """Reduction of both sides by an integer factor, each by its own matrix."""

    @checked
    def __init__(self, shape: Sequence[int], factor: PositiveInt = 4) -> None:
        _, height, width = image_shape(shape, "super-resolution")
        if height % factor or width % factor:
            sides = [n for n in range(2, 17) if height % n == 0 and width % n == 0]
            raise ValueError(
                f"factor={factor} is not allowed for images of shape {tuple(shape)}; it must "
                f"divide the height {height} and the width {width}"
                + (f": {', '.join(map(str, sides))}" if sides else "")
            )
        self.factor = factor
        super().__init__(shape, self.matrix(height, factor), self.matrix(width, factor))

    @staticmethod
    def matrix(side: int, factor: int) -> Tensor:
        """Returns the matrix of one side, of shape (side / factor, side)."""
        raise NotImplementedError

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y enlarged to the size of the image, every pixel a square."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


class AveragePool(_Downscale):
    """y is the mean of every square of factor x factor pixels, of shape (B, C, h, w).

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        factor: The reduction factor; it divides H and W.

    Raises:
        ValueError: If the factor does not divide H and W.
    """

    @staticmethod
    def matrix(side: int, factor: int) -> Tensor:
        one = torch.full((1, factor), 1 / factor, dtype=torch.float64)
        return torch.kron(torch.eye(side // factor, dtype=torch.float64), one)


class Bicubic(_Downscale):
    """y is the image reduced by bicubic interpolation with anti-aliasing, (B, C, h, w).

    With the factor f, pixel i of a row of y weighs pixel j of the image by
    k((j + 1/2) / f - (i + 1/2)), where

        k(u) = 3/2 |u|³ - 5/2 |u|² + 1            for |u| <= 1,
        k(u) = -1/2 |u|³ + 5/2 |u|² - 4 |u| + 2   for 1 < |u| <= 2, and 0 beyond.

    The weights of the pixels inside the image are divided by their sum, as in Pillow and in
    `interpolate(mode="bicubic", antialias=True)`. MATLAB mirrors the image at the edges instead.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        factor: The reduction factor f; it divides H and W.

    Raises:
        ValueError: If the factor does not divide H and W.

    Source:
        Keys, "Cubic convolution interpolation for digital image processing", 1981, eq. 15
        (a = -1/2).
    """

    @staticmethod
    def matrix(side: int, factor: int) -> Tensor:
        inner = (torch.arange(side, dtype=torch.float64) + 0.5) / factor
        outer = torch.arange(side // factor, dtype=torch.float64) + 0.5
        u = (inner - outer[:, None]).abs()
        near = (1.5 * u - 2.5) * u**2 + 1
        far = ((-0.5 * u + 2.5) * u - 4) * u + 2
        weights = torch.where(u <= 1, near, torch.where(u <= 2, far, 0.0))
        return weights / weights.sum(1, keepdim=True)
