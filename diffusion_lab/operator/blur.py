"""Gaussian and uniform blur with reflection at the edges.

The reflection c b a | a b c keeps the brightness up to the edges (zero padding darkens them), does
not couple opposite edges (as circular blur does), and makes A symmetric.
"""

__all__ = ["GaussianBlur", "UniformBlur"]

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, PositiveInt, checked
from diffusion_lab.operator.base import image_shape
from diffusion_lab.operator.separable import Separable


def reflected_convolution(kernel: Tensor, side: int) -> Tensor:
    """Returns the matrix (side, side) of a convolution with reflection c b a | a b c at the edges.

    Arguments:
        kernel: An odd number of weights, symmetric.
        side: The number of pixels.
    """
    radius = len(kernel) // 2
    places = torch.arange(side)[:, None] + torch.arange(-radius, radius + 1)
    places = places % (2 * side)
    places = torch.where(places < side, places, 2 * side - 1 - places)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, kernel.double().expand(side, -1))


class _Blur(Separable):
    """The same symmetric kernel along rows and columns, with reflection at the edges."""

    def __init__(self, shape: Sequence[int], kernel: Tensor) -> None:
        _, height, width = image_shape(shape, "blur")
        rows, columns = (reflected_convolution(kernel, side) for side in (height, width))
        super().__init__(shape, rows, columns)

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y


class GaussianBlur(_Blur):
    """y is the image after a Gaussian blur, (B, C, H, W), with reflection at the edges.

    The kernel is exp(-j² / 2 std²), truncated at 4 std, with sum 1. Most of its singular values
    are tiny; those below `SV_TOLERANCE` (1e-5) times the largest count as zero.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        std: The standard deviation of the kernel in pixels, at most the shorter side.

    Raises:
        ValueError: If `std` exceeds the shorter side.
    """

    @checked
    def __init__(self, shape: Sequence[int], std: Positive = 3.0) -> None:
        shorter = min(image_shape(shape, "blur")[1:])
        if std > shorter:
            raise ValueError(
                f"std={std} is not allowed for images of shape {tuple(shape)}; it must be a "
                f"number > 0 and at most {shorter} pixels"
            )
        radius = round(4 * std)
        j = torch.arange(-radius, radius + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (j / std) ** 2)
        super().__init__(shape, kernel / kernel.sum())


class UniformBlur(_Blur):
    """y is the mean of the size x size pixels around every pixel, (B, C, H, W), with reflection.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        size: The side of the window, an odd number of pixels below twice the shorter side.

    Raises:
        ValueError: If `size` is even or too large for the image.
    """

    @checked
    def __init__(self, shape: Sequence[int], size: PositiveInt = 9) -> None:
        shorter = min(image_shape(shape, "blur")[1:])
        if size % 2 == 0 or size > 2 * shorter:
            raise ValueError(
                f"size={size} is not allowed for images of shape {tuple(shape)}; it must be an "
                f"odd number of pixels from 1 to {2 * shorter - 1}"
            )
        super().__init__(shape, torch.full((size,), 1 / size, dtype=torch.float64))
