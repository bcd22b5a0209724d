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
def test_system_of_size_m_is_solved_in_m_iterations(solver) -> None:
    exact = solve(POSITIVE, RIGHT)
    for iterations in (M, M + 1, 3 * M):  # further iterations do not change the solution
        actual = solver(product(POSITIVE), RIGHT, iterations + (solver is conjugate_gradients))
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)


def test_gmres_solves_a_nonsymmetric_system() -> None:
    for iterations in (M, 2 * M):
        actual = gmres(product(OBLIQUE), RIGHT, iterations)
        torch.testing.assert_close(actual, solve(OBLIQUE, RIGHT), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("matrix", [POSITIVE, OBLIQUE, OBLIQUE - 4], ids=["spd", "oblique", "odd"])
def test_gmres_minimizes_the_residual_in_the_krylov_subspace(matrix: Tensor) -> None:
    """The reference is a least-squares fit on b, M b, ..., M^{k-1} b.

    The residual does not increase.
    """
    powers, last = [RIGHT], RIGHT.norm(dim=1)
    for k in range(1, M):
        basis = torch.stack(powers, 2)
        expected = basis @ torch.linalg.lstsq(matrix @ basis, RIGHT[..., None]).solution
        actual = gmres(product(matrix), RIGHT, k)
        torch.testing.assert_close(actual, expected[..., 0], rtol=1e-6, atol=1e-6)
        residual = (RIGHT - product(matrix)(actual)).norm(dim=1)
        assert bool((residual <= last * (1 + 1e-12)).all())
        powers, last = [*powers, product(matrix)(powers[-1])], residual


def test_conjugate_gradients_minimize_the_error_in_the_matrix_norm() -> None:
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
def test_zero_right_hand_side_or_zero_matrix_gives_zero(solver, matrix: Tensor) -> None:
    """Rows with a zero right-hand side do not affect the other rows."""
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
def test_solution_after_one_iteration_stays_finite_and_constant(
    solver, dtype: torch.dtype
) -> None:
    """b is an eigenvector of M. Later iterations would divide zero by zero."""
    values, axes = torch.linalg.eigh(POSITIVE)
    b = axes[..., 2].to(dtype)
    expected = (axes[..., 2] / values[:, 2, None]).to(dtype)
    for iterations in (1, 2, 12):
        actual = solver(product(POSITIVE), b, iterations)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@both
def test_singular_system_gives_the_minimum_norm_solution(solver) -> None:
    flat = ROOT[:, :, :3] @ ROOT[:, :, :3].mT
    b = product(flat)(RIGHT)
    actual = solver(product(flat), b, 4)
    expected = (torch.linalg.pinv(flat) @ b[..., None])[..., 0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_return_zero_for_negative_definite_rows() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    actual = conjugate_gradients(product(signs[:, None, None] * POSITIVE), RIGHT, M + 1)
    exact = solve(POSITIVE, RIGHT)
    torch.testing.assert_close(actual[::2], exact[::2], rtol=1e-9, atol=1e-9)
    assert float(actual[1::2].abs().max()) == 0


def test_gmres_is_stable_for_an_indefinite_matrix() -> None:
    """The curvature nearly cancels, so the residual of conjugate gradients is far above |b|."""
    matrix = torch.diag_embed(torch.tensor([[1.0, -0.999]], dtype=torch.float64))
    b = torch.ones(1, 2, dtype=torch.float64)

    def residual(v: Tensor) -> float:
        return float((b - product(matrix)(v)).norm() / b.norm())

    assert residual(conjugate_gradients(product(matrix), b, 1)) > 1000
    assert residual(gmres(product(matrix), b, 1)) <= 1
    assert residual(gmres(product(matrix), b, 2)) < 1e-10


@pytest.mark.parametrize("digits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gmres_is_stable_for_ill_conditioned_float32_systems(digits: int, symmetric: bool) -> None:
    """A system of condition number 10^4 is solved, also after further iterations.

    For 10^6 and 10^8, which float32 does not resolve, the residual stays near that of v = 0.
    """
    generator, size = torch.Generator().manual_seed(3), 12
    noise = torch.randn(2, 64, size, size, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise).Q
    values = torch.logspace(0, -digits, size, dtype=torch.float64)
    matrix = left @ (values[:, None] * (left if symmetric else right).mT)
    b = torch.randn(64, size, generator=generator, dtype=torch.float64)
    for iterations in (3, size, 2 * size):
        v = gmres(product(matrix.float()), b.float(), iterations).double()
        residual = (b - product(matrix)(v)).norm(dim=1) / b.norm(dim=1)
        solved = digits == 4 and iterations >= size
        assert float(residual.max()) < (0.002 if solved else 1.3)


@both
def test_rows_are_solved_independently(solver) -> None:
    matrix = OBLIQUE if solver is gmres else POSITIVE
    whole = solver(product(matrix), RIGHT, 3)
    for k in range(B):
        alone = solver(product(matrix[k : k + 1]), RIGHT[k : k + 1], 3)
        torch.testing.assert_close(alone[0], whole[k], rtol=1e-12, atol=1e-12)


@both
def test_images_give_the_same_solution_as_flat_vectors(solver) -> None:
    def image_product(v: Tensor) -> Tensor:
        return product(POSITIVE)(v.flatten(1)).reshape(v.shape)

    actual = solver(image_product, RIGHT.reshape(B, 1, 2, 3), 4)
    assert actual.shape == (B, 1, 2, 3)
    assert torch.equal(actual.flatten(1), solver(product(POSITIVE), RIGHT, 4))


@pytest.mark.parametrize("sigma_y", [0.3, 0.0])
def test_pull_back_matches_the_dense_formula(sigma_y: float) -> None:
    """Aᵀ (σ_y² I + v A Aᵀ)⁻¹ e, or with the pseudo-inverse, for one v and for one v per row."""
    a = normal(3, 5)
    a[2] = a[0] - a[1]  # so that A Aᵀ is singular
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
