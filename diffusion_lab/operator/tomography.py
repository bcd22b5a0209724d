r"""Parallel-beam tomography: line integrals of an image at several angles.

The ray of angle θ and detector position s is the line x cos θ + y sin θ = s, with the origin at
the centre of the image and the y-axis pointing up. Its integral is computed by Joseph's method.
For |cos θ| >= |sin θ| the ray is sampled once in every row, by linear interpolation between the
two nearest pixels, with the weight 1 / |cos θ|, the length of the ray in that row:

    (A x)_{θ, s} = 1 / (H |cos θ|) Σ_i x_i((s - y_i sin θ) / cos θ).

Otherwise rows and columns change roles. The weights form a sparse matrix, and Aᵀ is its transpose.

Sources:
    Joseph, "An improved algorithm for reprojecting rays through pixel images", 1982.
    Kak, Slaney, "Principles of computerized tomographic imaging", 1988, eq. 3.61 (the filter).
"""

__all__ = ["Tomography"]

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.operator.base import LinearOperator, image_shape


class Tomography(LinearOperator):
    """y is the sinogram of every channel, of shape (B, C, angles, detectors).

    The integrals are divided by H, so that y is the mean of the image along a ray through its
    middle: images in [-1, 1] have y in [-√2, √2]. Detectors are one pixel apart, and at angle 0
    y is the mean of the columns. The sparse matrix has about 2 H angles detectors entries, which
    suits images up to about 128 x 128 pixels.

    Arguments:
        shape: The shape (C, H, W) of one image x_0, with H = W.
        angles: The number of angles, equally spaced in [0, π).
        detectors: The number of detectors; None covers the diagonal of the image. With fewer,
            rays that pass near the corners are not measured.

    Raises:
        ValueError: If the image is not square.
    """

    matrix: Tensor
    transposed: Tensor

    @checked
    def __init__(
        self, shape: Sequence[int], angles: PositiveInt = 45, detectors: PositiveInt | None = None
    ) -> None:
        _, height, width = image_shape(shape, "tomography")
        if height != width:
            raise ValueError(
                f"shape={tuple(shape)} is not allowed for tomography; the image must be square, "
                "for example (1, 64, 64)"
            )
        super().__init__(shape)
        if detectors is None:
            detectors = math.ceil(math.sqrt(2) * height)
            detectors += (detectors - height) % 2  # at angle 0, rays pass through pixel centres
        self.angles, self.detectors = angles, detectors
        rows, columns, values = _joseph(height, angles, detectors)
        size = (angles * detectors, height * width)
        matrix = _compressed(rows, columns, values, size)
        transposed = _compressed(columns, rows, values, size[::-1])
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("transposed", transposed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _multiply(x.flatten(-2), self, adjoint=False)
        return y.reshape(*x.shape[:-2], self.angles, self.detectors)

    def adjoint(self, y: Tensor) -> Tensor:
        """Returns Aᵀ y, the back-projection, of shape (B, C, H, W)."""
        assert self.shape is not None
        x = _multiply(y.flatten(-2), self, adjoint=True)
        return x.reshape(*y.shape[:-2], *self.shape[-2:])

    def squared_norm(self, y: Tensor) -> Tensor:
        """Returns |A|², the squared Frobenius norm, of shape (B,)."""
        square = y.shape[1] * self.matrix.values().square().sum()
        return square.to(y).expand(len(y))

    def to_image(self, y: Tensor) -> Tensor:
        """Returns the filtered back-projection with the ramp filter of Ramachandran and Lakshmi.

        It approximates the image if there are about as many angles as pixels along a side.
        """
        assert self.shape is not None
        n = torch.arange(-self.detectors, self.detectors, device=y.device)
        odd = -1 / (math.pi * n.to(y.dtype)) ** 2
        kernel = torch.where(n % 2 == 0, 0.0, odd)
        kernel = torch.where(n == 0, 0.25, kernel).roll(-self.detectors)
        length = len(kernel)
        spectrum = torch.fft.rfft(y, n=length) * torch.fft.rfft(kernel)
        filtered = torch.fft.irfft(spectrum, n=length)[..., : self.detectors]
        # One H undoes the scale of y, the other that of Aᵀ.
        return math.pi / self.angles * self.shape[-1] ** 2 * self.adjoint(filtered)


def _joseph(side: int, angles: int, detectors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column numbers and values of the entries of A, see the top of this module."""
    theta = math.pi / angles * torch.arange(angles, dtype=torch.float64)
    cos, sin = theta.cos()[:, None, None], theta.sin()[:, None, None]
    by_row = cos.abs() >= sin.abs()  # else by column
    s = (torch.arange(detectors, dtype=torch.float64) - (detectors - 1) / 2)[None, :, None]
    line = torch.arange(side)  # of pixels, a row or a column
    centre = (side - 1) / 2
    # Position of the ray in row i, as a column number; in column j, as a row number from the top.
    across_row = (s - (centre - line) * sin) / torch.where(by_row, cos, 1.0) + centre
    across_column = centre - (s - (line - centre) * cos) / torch.where(by_row, 1.0, sin)
    place = torch.where(by_row, across_row, across_column)
    length = 1 / torch.where(by_row, cos, sin).abs() / side
    ray = torch.arange(angles * detectors).reshape(angles, detectors, 1)
    rows, columns, values = [], [], []
    first = place.floor()
    for shift, weight in ((0, 1 - (place - first)), (1, place - first)):
        other = first.long() + shift
        inside = (other >= 0) & (other < side) & (weight > 0)
        pixel = torch.where(by_row, line * side + other, other * side + line)
        rows.append(ray.expand_as(pixel)[inside])
        columns.append(pixel[inside])
        values.append((length * weight)[inside])
    return torch.cat(rows), torch.cat(columns), torch.cat(values)


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, size: Sequence[int]) -> Tensor:
    """The sparse matrix in compressed rows (CSR)."""
    order = torch.argsort(rows * size[1] + columns)
    starts = torch.zeros(size[0] + 1, dtype=torch.int64)
    starts[1:] = rows.bincount(minlength=size[0]).cumsum(0)
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns[order], values[order], tuple(size))


class _Product(torch.autograd.Function):
    """A x on (*, H W), or Aᵀ y on (*, angles detectors); the derivative of one is the other."""

    @staticmethod
    def forward(x: Tensor, operator: Tomography, adjoint: bool) -> Tensor:
        matrix = operator.transposed if adjoint else operator.matrix
        flat = x.reshape(-1, x.shape[-1])
        return (matrix.to(x.dtype) @ flat.T).T.reshape(*x.shape[:-1], matrix.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tomography, bool], output: Tensor) -> None:
        _, ctx.operator, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(gradient, ctx.operator, not ctx.adjoint), None, None


def _multiply(x: Tensor, operator: Tomography, adjoint: bool) -> Tensor:
    product: Tensor = _Product.apply(x, operator, adjoint)
    return product
