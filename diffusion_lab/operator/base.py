r"""Measurement operators A of the observation y = A(x_0) + σ_y n.

Three base classes, each with more structure than the one before:

- `Operator`: a differentiable function A.
- `LinearOperator`: a linear A with its adjoint Aᵀ.
- `SVDOperator`: a linear A with its singular value decomposition A = U S Vᵀ.

The decomposition is four functions on batches, never matrices:

    Vᵀ x: image -> coefficients,      V c: coefficients -> image,
    U c:  coefficients -> y,          Uᵀ y: y -> coefficients.

There are as many coefficients as the image has pixels times channels, with the same number of
axes. V is orthogonal. U is orthogonal between y and the coefficients that y has: U drops the
others, Uᵀ fills them with zeros. Hence

    A x = U S Vᵀ x,    Aᵀ y = V S Uᵀ y,    A⁺ y = V S⁺ Uᵀ y,    f(A Aᵀ) y = U f(S²) Uᵀ y.

All of this is real (a Fourier transform is written in its real form), so inner products of
coefficients equal those of images, and white noise stays white.

Matrices and tables are stored in float64 and cast to the dtype of the input.
"""

__all__ = [
    "SV_TOLERANCE", "Identity", "LinearOperator", "Operator", "SVDOperator", "image_shape",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.rng import KeyedGenerator, make_key

# Singular values of a blur below this fraction of the largest count as zero. In float32, y has a
# relative error of about 1e-7, which A⁺ amplifies by up to 1 / SV_TOLERANCE: to 1% of the image's
# scale. The error in A x is as small as float32 rounding: 3e-6 for a photograph of 256 x 256
# pixels and a blur of 3 pixels.
SV_TOLERANCE = 1e-5

PROBES = 16  # random vectors that estimate |A|²


def image_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    """Returns (C, H, W), the shape of one image, for an operator called `name` in errors.

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
    """A differentiable function A of images.

    Arguments:
        shape: The shape * of one image x_0, for example (3, 256, 256); None accepts any.
    """

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.shape = None if shape is None else tuple(shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Returns A(x), the measurement without noise, of shape (B, *').

        Arguments:
            x: Images, of shape (B, *).
        """

    @abstractmethod
    def to_image(self, y: Tensor) -> Tensor:
        """Returns a view of y for reports: images of shape (B, C, H, W) with range [-1, 1]."""


class LinearOperator(Operator):
    """A linear function A of images, given by A and its adjoint Aᵀ."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Returns Aᵀ y, of shape (B, *)."""

    def squared_norm(self, y: Tensor) -> Tensor:
        """Returns |A|², the squared Frobenius norm, of shape (B,).

        The default is Hutchinson's estimate, the mean of |Aᵀ z|² over a few random signs z.

        Arguments:
            y: Measurements, of which only shape, dtype and device are used.
        """
        keys = make_key(0, "squared norm", torch.arange(PROBES))
        z = KeyedGenerator(keys).uniform(*y.shape[1:]).to(y.device)
        signs = torch.where(z < 0.5, -1.0, 1.0).to(y.dtype)
        estimate = self.adjoint(signs).flatten(1).square().sum(1).mean()
        return estimate.expand(len(y))


class SVDOperator(LinearOperator):
    """A linear function A = U S Vᵀ of images, given by its singular value decomposition."""

    @property
    @abstractmethod
    def singular_values(self) -> Tensor:
        """S, non-negative, of a shape that broadcasts against the coefficients."""

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

    def adjoint(self, y: Tensor) -> Tensor:
        return self.v(self.singular_values.to(y) * self.ut(y))

    def squared_norm(self, y: Tensor) -> Tensor:
        """Returns |A|², the sum of the squared singular values, of shape (B,)."""
        c = self.ut(y)
        return self.singular_values.to(c).expand(c.shape).square().flatten(1).sum(1)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Returns A⁺ y, the image of least norm among those of least |A x - y|, (B, *)."""
        s = self.singular_values.to(y)
        return self.v(torch.where(s > 0, 1 / s, 0.0) * self.ut(y))

    def solve(self, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        """Returns (a A Aᵀ + b I)⁻¹ y, of y's shape.

        Arguments:
            y: Right-hand sides, of shape (B, *').
            a: Non-negative; broadcasts against the coefficients.
            b: Positive; broadcasts against the coefficients.
        """
        return self.u(self.ut(y) / (a * self.singular_values.to(y) ** 2 + b))

    def to_image(self, y: Tensor) -> Tensor:
        """Returns A⁺ y."""
        return self.pseudo_inverse(y)


class Identity(SVDOperator):
    """A = I: the measurement is the noisy image."""

    @property
    def singular_values(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def vt(self, x: Tensor) -> Tensor:
        return x

    v = u = ut = forward = adjoint = vt  # type: ignore[assignment]  # the argument's name differs
