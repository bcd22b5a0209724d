r"""Linear systems of the posterior methods: with A Aᵀ in closed form, with A V Aᵀ by iteration.

Conjugate gradients solve M v = b for a symmetric, positive M that is known by its products. From
v = 0 and d = ρ = b, for each row of the batch by itself,

    a = |ρ|² / dᵀ M d,    v <- v + a d,    ρ' = ρ - a M d,    d <- ρ' + |ρ'|² / |ρ|² d.

The number of iterations is fixed and nothing waits for the device. A row stops to move where the
formula ends: at its solution (ρ = 0), and where M turns out not to be positive (dᵀ M d <= 0), as
the Jacobian of a network may not be.

Source:
    Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
"""

__all__ = ["conjugate_gradients", "pull_back"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.operator import LinearOperator


def pull_back(
    operator: LinearOperator, residual: Tensor, variance: Tensor, sigma_y: float | Tensor
) -> Tensor:
    """Returns Aᵀ (σ_y² I + v A Aᵀ)⁻¹ e = V diag(s / (σ_y² + v s²)) Uᵀ e, of shape (B, *).

    Without noise it is A⁺ e / v, the limit of σ_y -> 0, whether A Aᵀ has an inverse or not.

    Arguments:
        operator: A.
        residual: e, of y's shape (B, *').
        variance: v, of shape () or (B,), above 0.
        sigma_y: σ_y, one number, at least 0.
    """
    c = operator.ut(residual)
    s = operator.singular_values.to(residual)
    v = variance.to(residual)
    v = v.reshape(-1, *[1] * (c.ndim - 1)) if v.ndim else v
    precision = s / (sigma_y**2 + v * s**2)
    return operator.v(torch.where(s > 0, precision, 0.0) * c)  # without noise 0 / 0 at s = 0


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Returns v with M v = b, approximately, of b's shape.

    Arguments:
        product: v -> M v, on batches; M symmetric and positive.
        b: The right-hand side, of shape (B, *).
        iterations: At least 1; as many as M has different eigenvalues make v exact.
    """
    v, residual, direction = torch.zeros_like(b), b, b
    square = _dot(b, b)
    # Where the residual is rounding, its direction is one of rounding too.
    converged = torch.finfo(b.dtype).eps ** 2 * square
    active = square > 0
    for _ in range(iterations):
        image = product(direction)
        curvature = _dot(direction, image)
        active = active & (curvature > 0) & (square > converged)
        step = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        v = v + step * direction
        residual = residual - step * image
        new = _dot(residual, residual)
        direction = (
            residual + torch.where(active, new / torch.where(active, square, 1.0), 0.0) * direction
        )
        square = new
    return v


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of each row, of shape (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))
