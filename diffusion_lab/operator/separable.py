r"""Separable operators: one matrix for the rows and one for the columns, Y = A_h X A_wᵀ.

With the decompositions of the two small matrices, A_h = U_h S_h V_hᵀ and A_w = U_w S_w V_wᵀ,

    Vᵀ X = V_hᵀ X V_w,    U C = U_h C U_wᵀ,    S_ij = (S_h)_i (S_w)_j.

No matrix is larger than the side of an image. y is at most as large as the image.

Source:
    Kawar, Elad, Ermon, Song, "Denoising diffusion restoration models", 2022, appendix D.
"""

__all__ = ["Separable"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusion_lab.operator.base import SV_TOLERANCE, SVDOperator, image_shape


class Separable(SVDOperator):
    """Y = A_h X A_wᵀ in every channel.

    Singular values below `SV_TOLERANCE` (1e-5) times the largest count as zero.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        rows: A_h, which mixes the rows, of shape (h, H) with h at most H.
        columns: A_w, which mixes the columns, of shape (w, W) with w at most W.

    Raises:
        ValueError: If a matrix does not fit the shape.
    """

    left_h: Tensor
    right_h: Tensor
    left_w: Tensor
    right_w: Tensor
    s: Tensor

    def __init__(self, shape: Sequence[int], rows: Tensor, columns: Tensor) -> None:
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
                    f"shape {tuple(shape)}; it must be (n, {side}) with n from 1 to {side}"
                )
            left, s, right = torch.linalg.svd(matrix.double(), full_matrices=True)
            self.register_buffer(f"left_{name}", left, persistent=False)
            self.register_buffer(f"right_{name}", right, persistent=False)
            values.append(pad(s, (0, side - len(s))))
        s = torch.outer(*values)
        s = torch.where(s >= SV_TOLERANCE * s.max(), s, 0.0)
        self.register_buffer("s", s, persistent=False)

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
