r"""Operators that work on rows and columns one after the other, Y = A_h X A_wᵀ per channel.

With the decompositions of the two small matrices, A_h = U_h S_h V_hᵀ and A_w = U_w S_w V_wᵀ,

    Vᵀ X = V_hᵀ X V_w,    U C = U_h C U_wᵀ,    S_ij = (S_h)_i (S_w)_j:

no matrix is larger than the side of an image. y is at most as large as the image.

Sources:
    Kawar, Elad, Ermon, Song, "Denoising diffusion restoration models", 2022, appendix D.
    Keys, "Cubic convolution interpolation for digital image processing", 1981 (a = -1/2).
"""

__all__ = ["AveragePool", "Bicubic", "GaussianBlur", "Separable", "UniformBlur"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusion_lab.operator.base import SV_TOLERANCE, SVDOperator, image_shape


class Separable(SVDOperator):
    """Y = A_h X A_wᵀ in every channel.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        rows: A_h, which mixes the rows, of shape (h, H) with h at most H.
        columns: A_w, which mixes the columns, of shape (w, W) with w at most W.
        cut: Singular values below this part of the largest count as zero.

    Raises:
        ValueError: If a matrix does not belong to the shape.
    """

    left_h: Tensor
    right_h: Tensor
    left_w: Tensor
    right_w: Tensor
    s: Tensor

    def __init__(
        self, shape: Sequence[int], rows: Tensor, columns: Tensor, cut: float = SV_TOLERANCE
    ) -> None:
        _, height, width = image_shape(shape, type(self).__name__)
        super().__init__(shape)
        values = []
        for name, key, matrix, side in (
            ("h", "rows", rows, height),
            ("w", "columns", columns, width),
        ):
            if matrix.ndim != 2 or matrix.shape[1] != side or not 0 < len(matrix) <= side:
                raise ValueError(
                    f"a matrix {key} of shape {tuple(matrix.shape)} is not allowed for images of "
                    f"shape {tuple(shape)}; it is (n, {side}) with n from 1 to {side}"
                )
            left, s, right = torch.linalg.svd(matrix.double(), full_matrices=True)
            self.register_buffer(f"left_{name}", left, persistent=False)
            self.register_buffer(f"right_{name}", right, persistent=False)
            values.append(pad(s, (0, side - len(s))))
        s = torch.outer(*values)
        self.register_buffer("s", torch.where(s >= cut * s.max(), s, 0.0), persistent=False)

    @property
    def singular_values(self) -> Tensor:
        return self.s

    def vt(self, x: Tensor) -> Tensor:
        return self.right_h.to(x) @ x @ self.right_w.to(x).mT

    def v(self, c: Tensor) -> Tensor:
        return self.right_h.to(c).mT @ c @ self.right_w.to(c)

    def u(self, c: Tensor) -> Tensor:
        c = c[..., : len(self.left_h), : len(self.left_w)]
        return self.left_h.to(c) @ c @ self.left_w.to(c).mT

    def ut(self, y: Tensor) -> Tensor:
        c = self.left_h.to(y).mT @ y @ self.left_w.to(y)
        missing_h = len(self.right_h) - len(self.left_h)
        missing_w = len(self.right_w) - len(self.left_w)
        return pad(c, (0, missing_w, 0, missing_h))


# --- super-resolution ---------------------------------------------------------------------------


class _Downscale(Separable):
    """An image made smaller by a whole factor, each side by a matrix of its own."""

    def __init__(self, shape: Sequence[int], factor: int) -> None:
        _, height, width = image_shape(shape, "super-resolution")
        whole = isinstance(factor, int) and factor >= 1
        if not whole or height % factor or width % factor:
            sides = [n for n in range(2, 17) if height % n == 0 and width % n == 0]
            raise ValueError(
                f"factor={factor} is not allowed for images of shape {tuple(shape)}; it is a "
                f"whole number, at least 1, that divides height {height} and width {width}"
                + (f": {', '.join(map(str, sides))}" if sides else "")
            )
        self.factor = factor
        super().__init__(shape, self.matrix(height, factor), self.matrix(width, factor))

    @staticmethod
    def matrix(side: int, factor: int) -> Tensor:
        """Returns the matrix of one side, of shape (side / factor, side)."""
        raise NotImplementedError

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y enlarged to the image's size, each pixel a square."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


class AveragePool(_Downscale):
    """Super-resolution: y is the means of squares of factor x factor pixels, (B, C, h, w).

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        factor: A whole number, at least 1, that divides H and W.

    Raises:
        ValueError: If the factor does not divide them.
    """

    def __init__(self, shape: Sequence[int], factor: int = 4) -> None:
        super().__init__(shape, factor)

    @staticmethod
    def matrix(side: int, factor: int) -> Tensor:
        one = torch.full((1, factor), 1 / factor, dtype=torch.float64)
        return torch.kron(torch.eye(side // factor, dtype=torch.float64), one)


class Bicubic(_Downscale):
    """Super-resolution: y is the image made smaller as Pillow and MATLAB do it, (B, C, h, w).

    Pixel i of a row sees pixel j with the weight k((j + 1/2) / f - (i + 1/2)), f the factor, where

        k(u) = 3/2 |u|³ - 5/2 |u|² + 1            for |u| <= 1,
        k(u) = -1/2 |u|³ + 5/2 |u|² - 4 |u| + 2   for 1 < |u| <= 2, 0 beyond.

    The weights of pixels inside the image are divided by their sum: no boundary is made up. This
    is what Pillow and `interpolate(mode="bicubic", antialias=True)` compute; MATLAB mirrors the
    image instead.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        factor: f, a whole number, at least 1, that divides H and W.

    Raises:
        ValueError: If the factor does not divide them.

    Source:
        Keys, 1981, eq. 15.
    """

    def __init__(self, shape: Sequence[int], factor: int = 4) -> None:
        super().__init__(shape, factor)

    @staticmethod
    def matrix(side: int, factor: int) -> Tensor:
        inner = (torch.arange(side, dtype=torch.float64) + 0.5) / factor
        outer = torch.arange(side // factor, dtype=torch.float64) + 0.5
        u = (inner - outer[:, None]).abs()
        near = (1.5 * u - 2.5) * u**2 + 1
        far = ((-0.5 * u + 2.5) * u - 4) * u + 2
        weights = torch.where(u <= 1, near, torch.where(u <= 2, far, 0.0))
        return weights / weights.sum(1, keepdim=True)


# --- blur ---------------------------------------------------------------------------------------


def mirrored(kernel: Tensor, side: int) -> Tensor:
    """Returns the matrix (side, side) of a convolution with mirrors at the edges, c b a | a b c.

    Arguments:
        kernel: An odd number of weights, symmetric.
        side: Pixels.
    """
    radius = len(kernel) // 2
    places = torch.arange(side)[:, None] + torch.arange(-radius, radius + 1)
    places = places % (2 * side)
    places = torch.where(places < side, places, 2 * side - 1 - places)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, kernel.double().expand(side, -1))


class _Blur(Separable):
    """The same symmetric kernel along rows and columns, mirrored at the edges.

    With mirrors the brightness is kept up to the edge (zeros outside would darken it), no edge
    sees the opposite one (as in a circular blur), and A is symmetric.
    """

    def __init__(self, shape: Sequence[int], kernel: Tensor) -> None:
        _, height, width = image_shape(shape, "blur")
        super().__init__(shape, mirrored(kernel, height), mirrored(kernel, width))

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y


class GaussianBlur(_Blur):
    """y is the image under a Gaussian blur, (B, C, H, W), mirrored at the edges.

    The kernel is exp(-j² / 2 std²), cut at 4 std, and sums to one. Most of its singular values are
    tiny; those below 1e-5 count as zero, see `SV_TOLERANCE` in base.py.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        std: The standard deviation of the kernel, in pixels, above 0 and at most the shorter side.

    Raises:
        ValueError: If std is out of its range.
    """

    def __init__(self, shape: Sequence[int], std: float = 3.0) -> None:
        shorter = min(image_shape(shape, "blur")[1:])
        if not 0 < std <= shorter:
            raise ValueError(
                f"std={std} is not allowed for images of shape {tuple(shape)}; it is above 0 and "
                f"at most {shorter} pixels"
            )
        radius = round(4 * std)
        j = torch.arange(-radius, radius + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (j / std) ** 2)
        super().__init__(shape, kernel / kernel.sum())


class UniformBlur(_Blur):
    """y is the means of the size x size pixels around each, (B, C, H, W), mirrored at the edges.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        size: An odd number of pixels, from 1 to twice the shorter side.

    Raises:
        ValueError: If the size is out of its range.
    """

    def __init__(self, shape: Sequence[int], size: int = 9) -> None:
        shorter = min(image_shape(shape, "blur")[1:])
        if not isinstance(size, int) or size % 2 == 0 or not 1 <= size <= 2 * shorter:
            raise ValueError(
                f"size={size} is not allowed for images of shape {tuple(shape)}; it is an odd "
                f"number of pixels from 1 to {2 * shorter - 1}: an even window has no middle"
            )
        super().__init__(shape, torch.full((size,), 1 / size, dtype=torch.float64))
