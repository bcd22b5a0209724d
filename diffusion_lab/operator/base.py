r"""Operators: what was seen of an image, y = A(x_0) + σ_y n.

A linear operator is known by its singular value decomposition, A = U S Vᵀ. The four maps are
functions on batches, never matrices:

    Vᵀ x: image -> coefficients,      V c: coefficients -> image,
    U c:  coefficients -> y,          Uᵀ y: y -> coefficients,

with as many coefficients as the image has numbers and as many axes, V orthogonal, and U orthogonal
between y and those coefficients that y has (U drops the others, Uᵀ fills them with zeros). From
them follow

    A x = U S Vᵀ x,    Aᵀ y = V S Uᵀ y,    A⁺ y = V S⁺ Uᵀ y,    f(A Aᵀ) y = U f(S²) Uᵀ y.

Everything is real (of a Fourier transform there is a real form), so that inner products of
coefficients are those of images and white noise is white in either. Draw noise as an image and
turn it all the same: then it is the same noise for every operator.

Matrices and tables are kept in float64 and rounded to the type of what they meet.
"""

__all__ = ["CUT", "Identity", "LinearOperator", "Operator", "image_shape"]

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Of a blur, singular values below this part of the largest count as zero. In float32 y carries an
# error of about 1e-7, which A⁺ multiplies by up to 1 / CUT: 1% of the image's scale. What A loses
# is as small as its rounding in float32: 3e-6 on a photograph of 256 x 256, blurred by 3 pixels.
CUT = 1e-5


def image_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    """Returns (C, H, W), the shape of one image that an operator called `name` is made for.

    Raises:
        ValueError: If it is not the shape of an image.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"shape={tuple(shape)} is not allowed; {name} is for images, of shape (C, H, W)"
        )
    channels, height, width = map(int, shape)
    return channels, height, width


class Operator(nn.Module, ABC):
    """A function A of images, differentiable.

    Arguments:
        shape: The shape * of one image x_0, for example (3, 256, 256); None takes any.
    """

    linear = False

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.shape = None if shape is None else tuple(shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Returns A(x).

        Arguments:
            x: Images, of shape (B, *).

        Returns:
            y without noise, of shape (B, *').
        """

    @abstractmethod
    def picture(self, y: Tensor) -> Tensor:
        """Returns y as images for a report, of shape (B, C, H, W) on the scale of [-1, 1]."""


class LinearOperator(Operator):
    """A linear function A = U S Vᵀ of images, see the top of this file."""

    linear = True

    @property
    @abstractmethod
    def singular_values(self) -> Tensor:
        """S, at least 0, of a shape that broadcasts against the coefficients."""

    @abstractmethod
    def vt(self, x: Tensor) -> Tensor:
        """Returns the coefficients Vᵀ x of images (B, *)."""

    @abstractmethod
    def v(self, c: Tensor) -> Tensor:
        """Returns the images V c."""

    @abstractmethod
    def u(self, c: Tensor) -> Tensor:
        """Returns U c, of y's shape (B, *')."""

    @abstractmethod
    def ut(self, y: Tensor) -> Tensor:
        """Returns the coefficients Uᵀ y, with zeros where y has none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.singular_values.to(x) * self.vt(x))

    def transpose(self, y: Tensor) -> Tensor:
        """Returns Aᵀ y, of shape (B, *)."""
        return self.v(self.singular_values.to(y) * self.ut(y))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Returns A⁺ y, the image of least norm that A takes to y, of shape (B, *)."""
        s = self.singular_values.to(y)
        return self.v(torch.where(s > 0, 1 / s, 0.0) * self.ut(y))

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """Returns (a A Aᵀ + b I)⁻¹ y, of y's shape.

        Arguments:
            y: Of shape (B, *').
            a: At least 0; it broadcasts against the coefficients.
            b: Likewise, above 0.
        """
        return self.u(self.ut(y) / (a * self.singular_values.to(y) ** 2 + b))

    def picture(self, y: Tensor) -> Tensor:
        return self.pseudo_inverse(y)


class Identity(LinearOperator):
    """A = I: the observation is a noisy image."""

    @property
    def singular_values(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def vt(self, x: Tensor) -> Tensor:
        return x

    v = u = ut = forward = transpose = vt  # type: ignore[assignment]  # x has other names there
