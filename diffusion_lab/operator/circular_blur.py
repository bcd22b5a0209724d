r"""Circular blur by the fast Fourier transform, and motion blur.

Let F be the orthonormal Fourier transform and h = |h| e^{iφ} the spectrum of the kernel, so that
A = F⁻¹ h F. The real form of F is the Hartley transform, which is symmetric, orthogonal and its
own inverse:

    V x = Re F x - Im F x.

A scales the coefficients k and -k and rotates them by the angle φ_k:

    S = |h|,    U = V R,    (R c)_k = cos φ_k c_k - sin φ_k c_{-k}.

Source:
    Bracewell, "Discrete Hartley transform", 1983.
"""

__all__ = ["CircularBlur", "MotionBlur", "hartley", "motion_kernel"]

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegativeInt, Positive, Range, checked
from diffusion_lab.operator.base import SV_TOLERANCE, SVDOperator, image_shape
from diffusion_lab.rng import KeyedGenerator, make_key

POINTS_PER_PIXEL = 256  # points of a path for each pixel of its length
TURN_STD = 1.5  # radians, standard deviation of the direction at the end of a random path


def hartley(x: Tensor) -> Tensor:
    """Returns the Hartley transform Re F x - Im F x over the last two axes."""
    spectrum: Tensor = torch.fft.fft2(x, norm="ortho")
    return spectrum.real - spectrum.imag


def opposite(c: Tensor) -> Tensor:
    """Returns the coefficients c_{-k} in the order of k."""
    return c.flip((-2, -1)).roll((1, 1), (-2, -1))


class CircularBlur(SVDOperator):
    """y is the circular convolution of the image with a kernel in every channel, (B, C, H, W).

    The image is continued periodically at the edges.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        kernel: The weights, of shape (a, b) of any size; [a // 2, b // 2] is the centre.

    Raises:
        ValueError: If the kernel is not a matrix of finite numbers that are not all zero.
    """

    cos: Tensor
    sin: Tensor
    s: Tensor

    def __init__(self, shape: Sequence[int], kernel: Tensor) -> None:
        _, height, width = image_shape(shape, "blur")
        kernel = torch.as_tensor(kernel, dtype=torch.float64)
        if kernel.ndim != 2 or not bool(kernel.any()) or not bool(kernel.isfinite().all()):
            raise ValueError(
                f"a kernel of shape {tuple(kernel.shape)} is not allowed; it must be a matrix of "
                "finite numbers, not all zero"
            )
        super().__init__(shape)
        rows = (torch.arange(kernel.shape[0]) - kernel.shape[0] // 2) % height
        columns = (torch.arange(kernel.shape[1]) - kernel.shape[1] // 2) % width
        response = torch.zeros(height, width, dtype=torch.float64)
        response.index_put_((rows[:, None], columns), kernel, accumulate=True)
        h = torch.fft.fft2(response)
        # Rounding breaks the symmetry of the spectrum, and with it the orthogonality of R.
        h = (h + opposite(h).conj()) / 2
        s = torch.where(h.abs() >= SV_TOLERANCE * h.abs().max(), h.abs(), 0.0)
        phase = torch.where(s > 0, h / h.abs(), 1.0)
        self.register_buffer("cos", phase.real.clone(), persistent=False)
        self.register_buffer("sin", phase.imag.clone(), persistent=False)
        self.register_buffer("s", s, persistent=False)

    @property
    def singular_values(self) -> Tensor:
        return self.s

    def vt(self, x: Tensor) -> Tensor:
        return hartley(x)

    def v(self, c: Tensor) -> Tensor:
        return hartley(c)

    def u(self, c: Tensor) -> Tensor:
        return hartley(self.cos.to(c) * c - self.sin.to(c) * opposite(c))

    def ut(self, y: Tensor) -> Tensor:
        d = hartley(y)
        return self.cos.to(d) * d + self.sin.to(d) * opposite(d)

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y


def motion_kernel(length: float, angle: float = 0.0, seed: int | None = None) -> Tensor:
    """Returns the kernel of a camera that moves at constant speed, float64, with sum 1.

    Every point of the path is distributed over four pixels with bilinear weights.

    Arguments:
        length: The length of the path, in pixels.
        angle: The direction, in degrees, anticlockwise; 0 is horizontal.
        seed: Seed of a random path, whose direction is a Brownian motion that starts at the
            angle; None for a straight path.
    """
    count = POINTS_PER_PIXEL * math.ceil(length)
    direction = torch.full((count,), math.radians(angle), dtype=torch.float64)
    if seed is not None:
        generator = KeyedGenerator(make_key(seed, "motion")[None])
        steps = generator.normal(count, dtype=torch.float64)[0]
        direction = direction + TURN_STD / math.sqrt(count) * steps.cumsum(0)
    path = torch.stack([-direction.sin(), direction.cos()], 1).cumsum(0) * (length / count)
    path = path - path.mean(0)
    radius = math.ceil(float(path.abs().max())) + 1
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
    corner = path.floor()
    row, column = (path - corner).unbind(1)
    i, j = (corner.long() + radius).unbind(1)
    for down, vertical in ((0, 1 - row), (1, row)):
        for right, horizontal in ((0, 1 - column), (1, column)):
            kernel.index_put_((i + down, j + right), vertical * horizontal, accumulate=True)
    return kernel / count


class MotionBlur(CircularBlur):
    """y is the image blurred by the motion of the camera, (B, C, H, W), periodic at the edges.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        length: The length of the path in pixels, below the shorter side.
        angle: The direction at its start, in degrees, anticlockwise; 0 is horizontal.
        seed: Seed of a random path, as of a shaken camera; None for a straight path.

    Raises:
        ValueError: If the path is not shorter than the shorter side.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        length: Positive = 9.0,
        angle: Annotated[float, Range(-360, 360)] = 45.0,
        seed: NonNegativeInt | None = None,
    ) -> None:
        shorter = min(image_shape(shape, "blur")[1:])
        if length >= shorter:
            raise ValueError(
                f"length={length} is not allowed for images of shape {tuple(shape)}; it must be a "
                f"number > 0 and below {shorter} pixels"
            )
        super().__init__(shape, motion_kernel(length, angle, seed))
