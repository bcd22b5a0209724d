"""Operator on vectors, given by a small matrix."""

__all__ = ["Matrix"]

import torch
from torch import Tensor

from diffusion_lab.operator.base import SVDOperator


class Matrix(SVDOperator):
    """y = A x for vectors x of shape (B, d), by the singular value decomposition of the matrix.

    Arguments:
        matrix: A, of shape (m, d) with m at most d.

    Raises:
        ValueError: If the matrix has another shape or contains a number that is not finite.
    """

    left: Tensor
    right: Tensor
    s: Tensor

    def __init__(self, matrix: Tensor) -> None:
        matrix = torch.as_tensor(matrix, dtype=torch.float64)
        if matrix.ndim != 2 or not 0 < matrix.shape[0] <= matrix.shape[1]:
            raise ValueError(
                f"a matrix of shape {tuple(matrix.shape)} is not allowed; it must be (m, d) with "
                "m from 1 to d. With more rows than d, pass R of its QR decomposition and Qᵀ y"
            )
        if not bool(matrix.isfinite().all()):
            raise ValueError("the matrix is not allowed; it contains a number that is not finite")
        super().__init__((matrix.shape[1],))
        left, s, right = torch.linalg.svd(matrix, full_matrices=True)
        # Zeros that rounding has made tiny.
        s = torch.where(s > matrix.shape[1] * torch.finfo(s.dtype).eps * s[0], s, 0.0)
        missing = matrix.shape[1] - matrix.shape[0]
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.register_buffer("s", torch.nn.functional.pad(s, (0, missing)), persistent=False)

    @property
    def singular_values(self) -> Tensor:
        return self.s

    def vt(self, x: Tensor) -> Tensor:
        return x @ self.right.to(x).mT

    def v(self, c: Tensor) -> Tensor:
        return c @ self.right.to(c)

    def u(self, c: Tensor) -> Tensor:
        return c[..., : len(self.left)] @ self.left.to(c).mT

    def ut(self, y: Tensor) -> Tensor:
        missing = len(self.right) - len(self.left)
        return torch.nn.functional.pad(y @ self.left.to(y), (0, missing))
