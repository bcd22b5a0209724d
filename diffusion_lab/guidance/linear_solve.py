r"""Batched linear solvers: closed form for A Aᵀ, conjugate gradients and GMRES for A V Aᵀ.

Both iterative solvers approximate v with M v = b in the Krylov space of b, M b, ..., M^{k-1} b,
independently for each row of the batch. The number k of iterations is fixed, and the host never
waits for the device. Where a formula would divide zero by zero (at the solution, or where
M b = 0), the row does not change.

Conjugate gradients require a symmetric positive M. From v = 0 and d = ρ = b,

    a = |ρ|² / dᵀ M d,    v <- v + a d,    ρ' = ρ - a M d,    d <- ρ' + |ρ'|² / |ρ|² d.

A matrix with the Jacobian of a network is neither. GMRES minimizes |b - M v|, which is at most
|b|: with an orthonormal basis Q_k of the same space and M Q_k = Q_{k+1} H,

    v = Q_k argmin_c | |b| e_1 - H c |.

Directions in which H is singular up to rounding are omitted from v. In float32 |b - M v| is then
at most 1.3 |b| for random matrices of condition number 10⁸, where it would reach 700 |b|; for
those of condition number 10⁴ no direction is omitted.

With the Jacobian of a small trained network, the residuals of conjugate gradients were 1000 |b|
and more.

Sources:
    Hestenes, Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    Saad, Schultz, "GMRES: a generalized minimal residual algorithm", 1986.
"""

__all__ = ["conjugate_gradients", "gmres", "pull_back", "solve"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.operator import LinearOperator, SVDOperator
from diffusion_lab.tensor import broadcast

ITERATIONS = 50  # of conjugate gradients, for operators without an SVD


def solve(
    operator: LinearOperator, y: Tensor, a: Tensor, b: Tensor | float, iterations: int = ITERATIONS
) -> Tensor:
    """Returns (a A Aᵀ + b I)⁻¹ y, of y's shape: from the SVD if there is one, else by CG.

    Arguments:
        operator: A.
        y: Right-hand sides, of shape (B, *').
        a: Positive; of shape (), (B,), or with as many dimensions as y.
        b: Non-negative, of such a shape; 0 only for y in the range of A.
        iterations: The number of conjugate-gradient iterations.
    """
    if isinstance(operator, SVDOperator):
        return operator.solve(y, a, b)

    def product(v: Tensor) -> Tensor:
        image: Tensor = a * operator(operator.adjoint(v)) + b * v
        return image

    return conjugate_gradients(product, y, iterations)


def pull_back(
    operator: LinearOperator, residual: Tensor, variance: Tensor, sigma_y: float
) -> Tensor:
    """Returns Aᵀ (σ_y² I + v A Aᵀ)⁻¹ e = V diag(s / (σ_y² + v s²)) Uᵀ e, of shape (B, *).

    An operator without an SVD uses conjugate gradients. Without noise the result is A⁺ e / v, the
    limit of σ_y -> 0, even if A Aᵀ is singular.

    Arguments:
        operator: A.
        residual: e, of y's shape (B, *').
        variance: v, of shape () or (B,), above 0.
        sigma_y: σ_y, at least 0.
    """
    if not isinstance(operator, SVDOperator):
        a = broadcast(variance, residual)
        return operator.adjoint(solve(operator, residual, a, sigma_y**2))
    c = operator.ut(residual)
    s, v = operator.singular_values, broadcast(variance, c)
    s = s.to(residual) if s.ndim else s.to(residual.dtype)
    return operator.v(_divide(s, sigma_y**2 + v * s**2) * c)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Returns v with M v = b, approximately, of b's shape.

    Arguments:
        product: v -> M v, on batches; M symmetric and positive semidefinite.
        b: The right-hand side, of shape (B, *).
        iterations: k, at least 1; v is exact if k is the number of distinct eigenvalues of M.
    """
    v, residual, direction = torch.zeros_like(b), b, b
    square = _dot(b, b)
    # Below this, the residual is rounding error, and so would be the direction.
    enough = torch.finfo(b.dtype).eps ** 2 * square
    for _ in range(iterations):
        image = product(direction)
        curvature = _dot(direction, image)
        moves = (curvature > 0) & (square > enough)
        step = torch.where(moves, _divide(square, curvature), 0.0)
        v = v + step * direction
        residual = residual - step * image
        last, square = square, _dot(residual, residual)
        direction = residual + _divide(square, last) * direction
    return v


def gmres(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Returns the v that minimizes |b - M v| in the span of b, ..., M^{k-1} b, of b's shape.

    Arguments:
        product: v -> M v, on batches; any M.
        b: The right-hand side, of shape (B, *).
        iterations: k, at least 1; v is exact if k is the number of elements of b.
    """
    rounding = 100 * torch.finfo(b.dtype).eps  # a relative norm below it is rounding error
    size = _dot(b, b).sqrt()
    basis, target, largest = [_divide(b, size)], [size], torch.zeros_like(size)
    columns: list[list[Tensor]] = []  # of H, made triangular by Givens rotations
    rotations: list[tuple[Tensor, Tensor]] = []
    for j in range(iterations):
        w = product(basis[j])
        floor = rounding * _dot(w, w).sqrt()
        h: list[Tensor] = []
        for q in basis:
            h.append(_dot(q, w))
            w = w - h[-1] * q
        rest = _dot(w, w).sqrt()
        rest = torch.where(rest > floor, rest, 0.0)
        basis.append(_divide(w, rest))
        h.append(rest)
        for i, (cos, sin) in enumerate(rotations):
            h[i], h[i + 1] = cos * h[i] + sin * h[i + 1], cos * h[i + 1] - sin * h[i]
        radius = torch.hypot(h[j], h[j + 1])
        cos, sin = _divide(h[j], radius), _divide(h[j + 1], radius)
        rotations.append((cos, sin))
        target[j:] = [cos * target[j], -sin * target[j]]  # the last is the norm of the residual
        done = target[-1].abs() <= rounding * size
        basis[-1] = torch.where(done, 0.0, basis[-1])
        # A smaller diagonal element is rounding error, and 1 over it would multiply v.
        largest = torch.maximum(largest, radius)
        columns.append([*h[:j], torch.where(radius > rounding * largest, radius, 0.0)])
    c: list[Tensor] = []
    for i in reversed(range(iterations)):
        known = torch.zeros_like(size)
        for k, value in enumerate(c):
            known = known + columns[i + 1 + k][i] * value
        c.insert(0, _divide(target[i] - known, columns[i][i]))
    x = torch.zeros_like(b)
    for value, q in zip(c, basis, strict=False):
        x = x + value * q
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of each row, of shape (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
