"""Linear solvers of the posterior methods against dense solutions, with degenerate cases."""

import pytest
import torch
from torch import Tensor

from diffusion_lab.guidance.linear_solve import conjugate_gradients, gmres, pull_back
from diffusion_lab.operator import Identity, Matrix

B, M = 4, 6
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


ROOT, RIGHT = normal(B, M, M), normal(B, M)
POSITIVE = ROOT @ ROOT.mT + 0.1 * torch.eye(M, dtype=torch.float64)
OBLIQUE = normal(B, M, M) + 2 * torch.eye(M, dtype=torch.float64)  # not symmetric
both = pytest.mark.parametrize("solver", [conjugate_gradients, gmres])


def product(matrix: Tensor):
    return lambda v: torch.einsum("bij,bj->bi", matrix.to(v), v)


def solve(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b[..., None])[..., 0]


@both
def test_the_system_is_solved_in_as_many_iterations_as_it_has_numbers(solver) -> None:
    exact = solve(POSITIVE, RIGHT)
    for iterations in (M, M + 1, 3 * M):  # more do no harm
        actual = solver(product(POSITIVE), RIGHT, iterations + (solver is conjugate_gradients))
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)


def test_gmres_solves_what_is_not_symmetric() -> None:
    for iterations in (M, 2 * M):
        actual = gmres(product(OBLIQUE), RIGHT, iterations)
        torch.testing.assert_close(actual, solve(OBLIQUE, RIGHT), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("matrix", [POSITIVE, OBLIQUE, OBLIQUE - 4], ids=["spd", "oblique", "odd"])
def test_gmres_leaves_the_least_residual_of_its_subspace(matrix: Tensor) -> None:
    """Against least squares on b, M b, ..., M^{k-1} b; so it is never above |b|, nor grows."""
    powers, last = [RIGHT], RIGHT.norm(dim=1)
    for k in range(1, M):
        basis = torch.stack(powers, 2)
        expected = basis @ torch.linalg.lstsq(matrix @ basis, RIGHT[..., None]).solution
        actual = gmres(product(matrix), RIGHT, k)
        torch.testing.assert_close(actual, expected[..., 0], rtol=1e-6, atol=1e-6)
        residual = (RIGHT - product(matrix)(actual)).norm(dim=1)
        assert bool((residual <= last * (1 + 1e-12)).all())
        powers, last = [*powers, product(matrix)(powers[-1])], residual


def test_conjugate_gradients_are_least_in_the_norm_of_the_matrix() -> None:
    powers = [RIGHT]
    for k in range(1, M):
        basis = torch.stack(powers, 2)
        gram = basis.mT @ POSITIVE @ basis
        expected = basis @ torch.linalg.solve(gram, basis.mT @ RIGHT[..., None])
        actual = conjugate_gradients(product(POSITIVE), RIGHT, k)
        torch.testing.assert_close(actual, expected[..., 0], rtol=1e-5, atol=1e-5)
        powers.append(product(POSITIVE)(powers[-1]))


@both
@pytest.mark.parametrize("matrix", [POSITIVE, 0 * POSITIVE], ids=["positive", "zero"])
def test_zero_gives_zero(solver, matrix: Tensor) -> None:
    """A right-hand side of zero, next to rows that have work to do; and a matrix of zero."""
    right = RIGHT.clone()
    right[1] = 0
    actual = solver(product(matrix), right, 10)
    assert bool(actual.isfinite().all()) and float(actual[1].abs().max()) == 0
    if not bool(matrix.any()):
        assert float(actual.abs().max()) == 0
    else:
        rest = [0, 2, 3]
        exact = solve(POSITIVE, right)[rest]
        torch.testing.assert_close(actual[rest], exact, rtol=1e-8, atol=1e-8)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_solved_at_once_stays_solved(solver, dtype: torch.dtype) -> None:
    """b along an axis of M: the first iteration ends it, and the others divide zero by zero."""
    values, axes = torch.linalg.eigh(POSITIVE)
    b = axes[..., 2].to(dtype)
    expected = (axes[..., 2] / values[:, 2, None]).to(dtype)
    for iterations in (1, 2, 12):
        actual = solver(product(POSITIVE), b, iterations)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@both
def test_a_singular_system_gets_its_solution_of_least_norm(solver) -> None:
    flat = ROOT[:, :, :3] @ ROOT[:, :, :3].mT
    b = product(flat)(RIGHT)
    actual = solver(product(flat), b, 4)
    expected = (torch.linalg.pinv(flat) @ b[..., None])[..., 0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_stop_where_the_matrix_is_not_positive() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    actual = conjugate_gradients(product(signs[:, None, None] * POSITIVE), RIGHT, M + 1)
    exact = solve(POSITIVE, RIGHT)
    torch.testing.assert_close(actual[::2], exact[::2], rtol=1e-9, atol=1e-9)
    assert float(actual[1::2].abs().max()) == 0


def test_gmres_is_not_led_astray_where_conjugate_gradients_are() -> None:
    """Of both signs, the curvature nearly cancels: their residual is far above |b|."""
    matrix = torch.diag_embed(torch.tensor([[1.0, -0.999]], dtype=torch.float64))
    b = torch.ones(1, 2, dtype=torch.float64)

    def residual(v: Tensor) -> float:
        return float((b - product(matrix)(v)).norm() / b.norm())

    assert residual(conjugate_gradients(product(matrix), b, 1)) > 1000
    assert residual(gmres(product(matrix), b, 1)) <= 1
    assert residual(gmres(product(matrix), b, 2)) < 1e-10


@both
def test_a_row_does_not_depend_on_the_others(solver) -> None:
    matrix = OBLIQUE if solver is gmres else POSITIVE
    whole = solver(product(matrix), RIGHT, 3)
    for k in range(B):
        alone = solver(product(matrix[k : k + 1]), RIGHT[k : k + 1], 3)
        torch.testing.assert_close(alone[0], whole[k], rtol=1e-12, atol=1e-12)


@both
def test_images_are_solved_as_their_numbers(solver) -> None:
    def image_product(v: Tensor) -> Tensor:
        return product(POSITIVE)(v.flatten(1)).reshape(v.shape)

    actual = solver(image_product, RIGHT.reshape(B, 1, 2, 3), 4)
    assert actual.shape == (B, 1, 2, 3)
    assert torch.equal(actual.flatten(1), solver(product(POSITIVE), RIGHT, 4))


@pytest.mark.parametrize("sigma_y", [0.3, 0.0])
def test_pull_back_is_the_dense_formula(sigma_y: float) -> None:
    """(σ_y² I + v A Aᵀ)⁻¹, or its pseudo-inverse, for one v and for one of each row."""
    a = normal(3, 5)
    a[2] = a[0] - a[1]  # so that A Aᵀ has no inverse
    e = normal(B, 3)
    for v in (torch.tensor(0.7), torch.tensor([0.1, 1.0, 20.0, 1e-3])):
        inner = sigma_y**2 * torch.eye(3) + v.double().expand(B)[:, None, None] * (a @ a.T)
        expected = torch.einsum("md,bmn,bn->bd", a, torch.linalg.pinv(inner, rtol=1e-10), e)
        actual = pull_back(Matrix(a), e, v, sigma_y)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_pull_back_on_images() -> None:
    e = normal(B, 3, 2, 2)
    v = torch.tensor([0.1, 1.0, 20.0, 1e-3], dtype=torch.float64)
    actual = pull_back(Identity(), e, v, 0.5)
    torch.testing.assert_close(actual, e / (0.25 + v[:, None, None, None]), rtol=1e-12, atol=0)
