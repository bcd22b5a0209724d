"""Tomography: its matrix against closed forms, and methods that need only the adjoint."""

import math

import pytest
import torch
from torch import Tensor

from diffusion_lab.analytic import Gaussian
from diffusion_lab.guidance import (
    DAPS,
    DDNM,
    DDRM,
    DMPS,
    DPS,
    ILVR,
    JFPS,
    MMPS,
    SDA,
    TDS,
    TMPD,
    DiffPIR,
    Guidance,
    Guided,
    Observation,
    PiGDM,
    PnPDM,
    REDDiff,
    Replacement,
)
from diffusion_lab.guidance.linear_solve import pull_back, solve
from diffusion_lab.metric.stein import posterior_score
from diffusion_lab.operator import LinearOperator, Matrix, Tomography
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import DDIM, Ancestral
from diffusion_lab.schedule import VP, Cosine

SHAPE, D, B = (1, 4, 4), 16, 3
OPERATOR = Tomography(SHAPE, angles=3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def dense(operator: LinearOperator, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The matrix A of shape (m, d), computed column by column."""
    d = math.prod(shape)
    return operator(torch.eye(d, dtype=torch.float64).unflatten(1, shape)).flatten(1).T


A = dense(OPERATOR)
EIGENVALUES = torch.logspace(-1.5, 0, D, dtype=torch.float64)
AXES = torch.linalg.qr(draw(D, D, seed=1)).Q
COVARIANCE = AXES @ EIGENVALUES.diag() @ AXES.T
PRIOR = Gaussian(draw(D, seed=2) / 2, COVARIANCE, shape=SHAPE)
SIGMA_Y = 0.05
X_0 = PRIOR.sample(B, torch.Generator().manual_seed(3))
Y = OPERATOR(X_0) + SIGMA_Y * draw(B, 1, 3, OPERATOR.detectors, seed=4)


# --- the operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("detectors", [None, 5, 6, 8])
def test_adjoint_is_the_transpose(detectors: int | None) -> None:
    operator = Tomography((2, 6, 6), angles=7, detectors=detectors)
    x = draw(3, 2, 6, 6)
    y = draw(3, 2, 7, operator.detectors, seed=1)
    assert operator(x).shape == y.shape and operator.adjoint(y).shape == x.shape
    left = (operator(x) * y).flatten(1).sum(1)
    close(left, (x * operator.adjoint(y)).flatten(1).sum(1))


def test_gradient_is_the_adjoint() -> None:
    x, y = draw(B, *SHAPE), draw(*Y.shape, seed=1)
    close(torch.func.vjp(OPERATOR, x)[1](y)[0], OPERATOR.adjoint(y))
    close(torch.func.vjp(OPERATOR.adjoint, y)[1](x)[0], OPERATOR(x))
    assert torch.autograd.gradcheck(OPERATOR, x[:1].requires_grad_())


def test_projections_at_0_and_90_degrees_are_column_and_row_means() -> None:
    x = draw(2, 3, 8, 8)
    operator = Tomography((3, 8, 8), angles=2, detectors=8)
    y = operator(x)
    close(y[:, :, 0], x.mean(2))
    close(y[:, :, 1], x.mean(3).flip(-1))  # the y-axis points up
    wide = Tomography((3, 8, 8), angles=2)
    assert wide.detectors == 12
    close(wide(x)[:, :, 0], torch.nn.functional.pad(x.mean(2), (2, 2)))


def test_sum_of_a_projection_is_the_same_at_all_angles() -> None:
    """A pixel has the same total weight at all angles, up to interpolation."""
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 3:12, 5:14] = draw(9, 9) + 3
    y = Tomography((1, 16, 16), angles=9)(x)
    torch.testing.assert_close(
        y.sum(-1), (x.sum((-2, -1)) / 16).expand(1, 9)[None], rtol=0.02, atol=0
    )


def grid(side: int) -> tuple[Tensor, Tensor]:
    """Coordinates x and y of the pixels, in pixels from the center."""
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return line.expand(side, side), -line[:, None].expand(side, side)


def rays(operator: Tomography) -> tuple[Tensor, Tensor]:
    """The angle (angles, 1) and the position (detectors,) of every ray."""
    theta = math.pi / operator.angles * torch.arange(operator.angles, dtype=torch.float64)
    place = torch.arange(operator.detectors, dtype=torch.float64) - (operator.detectors - 1) / 2
    return theta[:, None], place


def bump(side: int, width: float, centre: tuple[float, float]) -> Tensor:
    x, y = grid(side)
    return torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))


def test_projections_of_a_gaussian_match_the_closed_form() -> None:
    """The integral of exp(-r² / 2 w²) along a line at distance s is w √(2π) exp(-s² / 2 w²)."""
    operator = Tomography((1, 48, 48), angles=20)
    width, centre = 4.0, (5.0, -3.0)
    theta, place = rays(operator)
    distance = place - centre[0] * theta.cos() - centre[1] * theta.sin()
    expected = width * math.sqrt(2 * math.pi) * torch.exp(-(distance**2) / (2 * width**2)) / 48
    actual = operator(bump(48, width, centre)[None, None])[0, 0]
    close(actual, expected, 0.01 * float(expected.max()))


def test_projections_of_a_disk_match_the_closed_form() -> None:
    """The chord of a disk of radius R at the distance s is 2 √(R² - s²)."""
    side, radius = 64, 20.0
    operator = Tomography((1, side, side), angles=16)
    x, y = grid(side)
    disc = (radius + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1)  # the edge is one pixel wide
    _, place = rays(operator)
    chord = 2 * (radius**2 - place**2).clamp(min=0).sqrt() / side
    inside = place.abs() < radius - 2
    actual = operator(disc[None, None])[0, 0]
    close(actual[:, inside], chord[inside].expand(16, -1), 0.5 / side)
    assert float(actual[:, place.abs() > radius + 1.5].abs().max()) == 0


def test_to_image_reconstructs_a_smooth_image() -> None:
    image = bump(32, 4.0, (3.0, 2.0)) - 0.5 * bump(32, 3.0, (-6.0, -1.0))
    operator = Tomography((1, 32, 32), angles=60)
    shown = operator.to_image(operator(image[None, None]))
    close(shown[0, 0], image, 0.05)


def test_squared_norm_matches_the_matrix() -> None:
    close(OPERATOR.squared_norm(Y), A.square().sum().expand(B))
    colour = Tomography((3, 4, 4), angles=3)
    y = colour(draw(2, 3, 4, 4))
    close(colour.squared_norm(y), 3 * A.square().sum().expand(2))
    estimate = LinearOperator.squared_norm(colour, y)
    torch.testing.assert_close(estimate, colour.squared_norm(y), rtol=0.2, atol=0)


def test_float32_and_batched_projections_agree() -> None:
    x = draw(B, *SHAPE)
    single = OPERATOR(x.float())
    assert single.dtype == torch.float32
    close(single.double(), OPERATOR(x), 1e-6)
    close(OPERATOR(x), torch.cat([OPERATOR(row[None]) for row in x]))
    assert OPERATOR.state_dict() == {}


def test_invalid_settings_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape=\(1, 4, 6\) is not allowed for tomography"):
        Tomography((1, 4, 6))
    with pytest.raises(ValueError, match="angles=0 is not allowed; it must be an integer >= 1"):
        Tomography(SHAPE, angles=0)
    with pytest.raises(ValueError, match="detectors=0 is not allowed"):
        Tomography(SHAPE, detectors=0)


# --- linear systems without a decomposition -----------------------------------------------------


@pytest.mark.parametrize("a", [0.3, 2.0])
def test_conjugate_gradients_match_the_dense_solution(a: float) -> None:
    y = draw(*Y.shape, seed=6)
    matrix = a * A @ A.T + SIGMA_Y**2 * torch.eye(len(A)).double()
    expected = torch.linalg.solve(matrix, y.flatten(1).T).T
    actual = solve(OPERATOR, y, torch.tensor(a), SIGMA_Y**2)
    torch.testing.assert_close(actual.flatten(1), expected, rtol=1e-6, atol=1e-6)
    variance = torch.tensor([a, 1.0, 0.1], dtype=torch.float64)
    pulled = pull_back(OPERATOR, y, variance, SIGMA_Y).flatten(1)
    close(pulled[0], A.T @ expected[0], 1e-8)
    plain = pull_back(
        Matrix(A) if len(A) <= D else _rotated(), _coefficients(y), variance, SIGMA_Y
    )
    close(pulled, plain, 1e-8)


def _rotated() -> Matrix:
    """R of the QR decomposition of A, which has more rows than columns."""
    return Matrix(torch.linalg.qr(A).R)


def _coefficients(y: Tensor) -> Tensor:
    """Qᵀ y for `_rotated`; y itself if A has no more rows than columns."""
    return y.flatten(1) if len(A) <= D else y.flatten(1) @ torch.linalg.qr(A).Q


def test_likelihood_step_of_daps_is_exact() -> None:
    """x ~ N(x̂, ρ² I) N(y; A x, σ_y² I); its mean and covariance follow from the linear map."""
    rho, m = 0.7, len(A)
    rows = 1 + D + m
    observation = Observation(Y[:1].expand(rows, *Y.shape[1:]), SIGMA_Y, OPERATOR)
    centre = X_0[:1].expand(rows, *SHAPE)

    def noise(x: Tensor) -> Tensor:
        z = torch.zeros(rows, x[0].numel(), dtype=torch.float64)
        first = 1 if x[0].numel() == D else 1 + D
        z[first : first + z.shape[1]] = torch.eye(z.shape[1]).double()
        return z.reshape(x.shape)

    x = DAPS(1).likelihood_step(observation, centre, rho, noise).flatten(1)
    response = x[1:] - x[0]
    covariance = torch.linalg.inv(torch.eye(D) / rho**2 + A.T @ A / SIGMA_Y**2)
    mean = covariance @ (X_0[0].flatten() / rho**2 + A.T @ Y[0].flatten() / SIGMA_Y**2)
    close(x[0], mean, 1e-8)
    close(response.T @ response, covariance, 1e-8)


def test_posterior_score_matches_that_of_the_decomposition() -> None:
    denoiser, t = PRIOR.denoiser(VP()), VP().t_from_ratio(0.1)
    x_t = draw(B, *SHAPE, seed=8)
    actual = posterior_score(denoiser, x_t, t, Observation(Y, SIGMA_Y, OPERATOR))
    flat = Gaussian(PRIOR.means[0], COVARIANCE).denoiser(VP())
    other = Observation(_coefficients(Y), SIGMA_Y, Matrix(A) if len(A) <= D else _rotated())
    expected = posterior_score(flat, x_t.flatten(1), t, other)
    torch.testing.assert_close(actual.flatten(1), expected, rtol=1e-7, atol=1e-7)


# --- posterior methods --------------------------------------------------------------------------


def estimate(guidance: Guided, ratio: float) -> tuple[Tensor, Tensor]:
    """The method's and the exact E[x_0 | x_t, y]."""
    schedule = VP()
    t = schedule.t_from_ratio(ratio)
    x_t = schedule(t)[0] * (X_0 + ratio * draw(B, *SHAPE, seed=5))
    observation = Observation(Y, SIGMA_Y, OPERATOR)
    guidance.check(observation)
    actual = guidance.denoiser(PRIOR.denoiser(schedule), observation)(x_t, t)
    exact = PRIOR.conditional_denoiser(schedule, Y, A, SIGMA_Y)
    return actual, exact(x_t, t)


@pytest.mark.parametrize("ratio", [0.05, 0.7, 10.0])
def test_mmps_and_jfps_are_exact_for_a_gaussian_prior(ratio: float) -> None:
    for guidance in (MMPS(iterations=16), JFPS(covariance=COVARIANCE)):
        actual, expected = estimate(guidance, ratio)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_mmps_samples_the_exact_posterior_mean() -> None:
    """DDIM is affine in its start, so the mean of two opposite starts is the posterior mean."""
    schedule = Cosine()
    posterior = PRIOR.posterior(Y[0], A, SIGMA_Y)
    observation = Observation(Y[:1].expand(2, *Y.shape[1:]), SIGMA_Y, OPERATOR)
    start = draw(1, *SHAPE, seed=7)
    denoiser = MMPS(iterations=16).denoiser(PRIOR.denoiser(schedule), observation)
    x_0 = DDIM(steps=32)(denoiser, torch.cat([start, -start])).mean(0)
    close(x_0.flatten(), posterior.means[0], 0.02)


METHODS: list[Guidance] = [
    MMPS(), TMPD(), SDA(0.2), SDA(1.0, detach=True), DPS(), DMPS(), PiGDM(), JFPS(),
    DAPS(ode_steps=2), PnPDM(8, rho_max=0.5, rho_min=0.1, decay=0.8), REDDiff(),
]  # fmt: skip


@pytest.mark.parametrize("guidance", METHODS, ids=lambda guidance: type(guidance).__name__)
def test_methods_with_only_the_adjoint_reduce_the_residual(guidance: Guidance) -> None:
    y = Y[:1].expand(8, *Y.shape[1:])
    generator = KeyedGenerator(make_key(0, torch.arange(8)))
    observation = Observation(y, SIGMA_Y, OPERATOR)
    x_0 = guidance(PRIOR.denoiser(VP()), Ancestral(32), observation, generator=generator)
    assert x_0.shape == (8, *SHAPE)
    prior = (A @ PRIOR.means[0] - Y[0].flatten()).norm()  # the residual of the prior mean
    assert float((x_0.flatten(1) @ A.T - y.flatten(1)).norm(dim=1).mean()) < float(prior)


@pytest.mark.parametrize(
    "guidance", [DDRM(), DDNM(), DiffPIR(), ILVR(), Replacement(), TDS()],
    ids=lambda guidance: type(guidance).__name__,
)  # fmt: skip
def test_methods_that_need_a_decomposition_raise_an_error(guidance: Guidance) -> None:
    name = type(guidance).__name__
    with pytest.raises(
        ValueError, match=f"{name} needs the singular value .* Tomography has none"
    ):
        guidance(PRIOR.denoiser(VP()), Ancestral(4), Observation(Y, SIGMA_Y, OPERATOR))
