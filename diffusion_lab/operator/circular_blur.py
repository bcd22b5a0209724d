r"""Circular blur by the fast Fourier transform, and motion blur.

Let F be the orthonormal transform and h = |h| e^{iφ} the spectrum of the kernel, A = F⁻¹ h F. Its
real form is Hartley's transform, which is symmetric, orthogonal and its own inverse:

    V x = Re F x - Im F x.

A mixes the coefficients k and -k, by a rotation of the angle φ_k after a scaling:

    S = |h|,    U = V R,    (R c)_k = cos φ_k c_k - sin φ_k c_{-k}.

Source:
    Bracewell, "Discrete Hartley transform", 1983.
"""

__all__ = ["CircularBlur", "MotionBlur", "hartley", "motion_kernel"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.operator.base import SV_TOLERANCE, SVDOperator, image_shape
from diffusion_lab.rng import KeyedGenerator, make_key

POINTS = 256  # of a path, for each pixel of its length
TURN = 1.5  # radians, standard deviation of the turn of a shaken camera by the end of its path


def hartley(x: Tensor) -> Tensor:
    """Returns Hartley's transform Re F x - Im F x over the last two axes."""
    spectrum = torch.fft.fft2(x, norm="ortho")
    return spectrum.real - spectrum.imag


def opposite(c: Tensor) -> Tensor:
    """Returns the coefficients c_{-k} in the places of c_k."""
    return c.flip((-2, -1)).roll((1, 1), (-2, -1))


class CircularBlur(SVDOperator):
    """y is the circular convolution of the image with a kernel in every channel, (B, C, H, W).

    What leaves the image at one edge comes in at the opposite one.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        kernel: The weights, of shape (a, b), any size; [a // 2, b // 2] is the middle.

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
                f"a kernel of shape {tuple(kernel.shape)} is not allowed; it is a matrix of "
                "finite numbers, not all zero"
            )
        super().__init__(shape)
        rows = (torch.arange(kernel.shape[0]) - kernel.shape[0] // 2) % height
        columns = (torch.arange(kernel.shape[1]) - kernel.shape[1] // 2) % width
        response = torch.zeros(height, width, dtype=torch.float64)
        response.index_put_((rows[:, None], columns), kernel, accumulate=True)
        h = torch.fft.fft2(response)
        # Rounding breaks the symmetry of the spectrum of real numbers, and R's orthogonality.
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
    """Returns the kernel of a camera that moves at a constant speed, float64, sum one.

    Every point of the path is shared out between its four neighbours (bilinear weights).

    Arguments:
        length: The length of the path, in pixels.
        angle: The direction, in degrees, anticlockwise; 0 is horizontal.
        seed: None for a straight path. A number for a shaken one, a function of it: its direction
            is a Brownian motion that starts at the angle.
    """
    count = POINTS * math.ceil(length)
    direction = torch.full((count,), math.radians(angle), dtype=torch.float64)
    if seed is not None:
        generator = KeyedGenerator(make_key(seed, "motion")[None])
        steps = generator.normal(count, dtype=torch.float64)[0]
        direction = direction + TURN / math.sqrt(count) * steps.cumsum(0)
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
    """y is the image as a moving camera takes it, (B, C, H, W), circular at the edges.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        length: The length of the path, in pixels, above 0 and below the shorter side.
        angle: The direction at its beginning, in degrees, anticlockwise; 0 is horizontal.
        seed: None for a straight path; a number, at least 0, for that of a shaken camera.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        length: float = 9.0,
        angle: float = 45.0,
        seed: int | None = None,
    ) -> None:
        shorter = min(image_shape(shape, "blur")[1:])
        if not 0 < length < shorter:
            raise ValueError(
                f"length={length} is not allowed for images of shape {tuple(shape)}; it is above "
                f"0 and below {shorter} pixels"
            )
        if not -360 <= angle <= 360:
            raise ValueError(f"angle={angle} is not allowed; it is from -360 to 360 degrees")
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise ValueError(
                f"seed={seed} is not allowed; it is null (a straight path) or a whole number, at "
                "least 0"
            )
        super().__init__(shape, motion_kernel(length, angle, seed))
