"""Graders of components: identities and closed forms that hold for every component of a kind.

`test_components.py` applies them to every file of conf/. A grader raises AssertionError.
"""

from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.analytic import Gaussian
from diffusion_lab.guidance import Guidance, Observation
from diffusion_lab.loss import Loss
from diffusion_lab.operator import Identity, LinearOperator, Matrix, Operator, SVDOperator
from diffusion_lab.parameterization import Parameterization
from diffusion_lab.sampler import Sampler
from diffusion_lab.schedule import Schedule

D, SIGMA_Y = 4, 0.3
COUNT, POSTERIOR_COUNT = 2000, 1000  # samples of the prior and of a posterior
GENERATOR = torch.Generator().manual_seed(0)
MEAN = torch.tensor([0.5, -0.3, 0.1, -0.7], dtype=torch.float64)
AXES = torch.linalg.qr(torch.randn(D, D, generator=GENERATOR, dtype=torch.float64)).Q
COVARIANCE = AXES @ torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64).diag() @ AXES.T
PRIOR = Gaussian(MEAN, COVARIANCE)
MATRIX = torch.randn(2, D, generator=GENERATOR, dtype=torch.float64)
TRUTH = PRIOR.sample(1, GENERATOR)
# Some methods assume data with the covariance 0.5² I, or an A Aᵀ that is diagonal.
ISOTROPIC = Gaussian(MEAN, 0.25 * torch.eye(D, dtype=torch.float64))
ORTHOGONAL = torch.tensor([[1.0], [2.0]]).double() * torch.linalg.qr(MATRIX.T).Q.T


def grade_schedule(schedule: Schedule) -> None:
    """σ_0 = 0, r_t increases, `t_from_ratio` inverts it, and f, g, G are consistent with α, σ."""
    alpha_0, sigma_0 = schedule(torch.zeros((), dtype=torch.float64))
    assert float(alpha_0) == 1 and float(sigma_0) == 0
    t = torch.linspace(schedule.t_min, 1, 201, dtype=torch.float64)[1:-1]
    ratio = schedule.ratio(t)
    assert bool((ratio.diff() > 0).all()), "r_t does not increase"
    alpha_t, sigma_t = schedule(t)
    torch.testing.assert_close(sigma_t / alpha_t, ratio, rtol=1e-8, atol=0)
    torch.testing.assert_close(schedule.t_from_ratio(ratio), t, rtol=1e-6, atol=1e-9)
    # In the middle of DDPM's intervals, where discrete schedules are smooth.
    t = (torch.arange(50, 950, 50, dtype=torch.float64) + 0.5) / 1000
    h = 1e-6
    (alpha_a, sigma_a), (alpha_b, sigma_b) = schedule(t - h), schedule(t + h)
    alpha_t, sigma_t = schedule(t)
    drift = (alpha_b.log() - alpha_a.log()) / (2 * h)
    square = (sigma_b**2 - sigma_a**2) / (2 * h) - 2 * drift * sigma_t**2
    torch.testing.assert_close(schedule.drift(t), drift, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(schedule.diffusion(t) ** 2, square, rtol=1e-4, atol=1e-6)
    integral = (schedule.diffusion_integral(t + h) - schedule.diffusion_integral(t - h)) / (2 * h)
    torch.testing.assert_close(integral, square, rtol=1e-4, atol=1e-6)


def grade_parameterization(parameterization: Parameterization, schedule: Schedule) -> None:
    """`denoised` recovers x_0 from the target of (x_0, ε)."""
    x_0 = torch.randn(8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for t in (0.1, 0.5, 0.9):
        alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
        x_t = alpha_t * x_0 + sigma_t * noise
        target = parameterization.target(x_0, noise, alpha_t, sigma_t)
        denoised = parameterization.denoised(target, x_t, alpha_t, sigma_t)
        torch.testing.assert_close(denoised, x_0, rtol=1e-9, atol=1e-9)


def grade_loss(loss: Loss, schedule: Schedule, parameterization: Parameterization) -> None:
    """The weight of an error is finite, never negative, and not zero at every time."""
    t = torch.linspace(schedule.t_min, 1, 50, dtype=torch.float64)
    weight = loss.output_weight(schedule, parameterization, t)
    assert bool(weight.isfinite().all()), "a weight is not finite"
    assert float(weight.min()) >= 0, "a weight is negative"
    assert float(weight.max()) > 0, "every weight is zero"


def grade_sampler(sampler: Sampler, schedule: Schedule, tolerance: float = 0.1) -> None:
    """The samples of a Gaussian prior have its mean and covariance, in whitened coordinates."""
    generator = torch.Generator().manual_seed(3)
    start = schedule.prior((COUNT, D), generator).double()
    samples = sampler(PRIOR.denoiser(schedule), start, generator=generator)
    _check_moments(samples, MEAN, COVARIANCE, tolerance)


def _check_moments(samples: Tensor, mean: Tensor, covariance: Tensor, tolerance: float) -> None:
    whitened = torch.linalg.solve(torch.linalg.cholesky(covariance), (samples - mean).T).T
    bias = float(whitened.mean(0).norm())
    assert bias < tolerance, f"the mean is off by {bias:.3f} standard deviations"
    spread = torch.linalg.eigvalsh(whitened.T.cov())
    low, high = float(spread.min()), float(spread.max())
    assert 1 - 1.5 * tolerance < low and high < 1 + 1.5 * tolerance, (
        f"the variance is {low:.3f} to {high:.3f} of the exact one"
    )


def grade_guidance(
    guidance: Guidance,
    sampler: Sampler,
    schedule: Schedule,
    grade: Literal["exact", "isotropic", "approximate"] = "exact",
) -> None:
    """The samples have the mean and the covariance of the exact posterior of a Gaussian prior.

    Arguments:
        guidance: The method.
        sampler: Its sampler.
        schedule: The schedule.
        grade: "exact" compares both moments for a general prior and operator (for a deterministic
            method the mean only); "isotropic" does so for the prior N(m, 0.5² I) and an operator
            with orthogonal rows; "approximate" requires that the error of the mean is less than
            a quarter of the distance between the means of the prior and of the posterior.
    """
    prior, matrix = (ISOTROPIC, ORTHOGONAL) if grade == "isotropic" else (PRIOR, MATRIX)
    observation, matrix = _observation(guidance, matrix)
    mean, covariance = _posterior(prior, matrix, observation.y[0])
    generator = torch.Generator().manual_seed(4)
    samples = guidance(prior.denoiser(schedule), sampler, observation, generator=generator)
    assert bool(samples.isfinite().all())
    if grade != "approximate" and guidance.stochastic:
        _check_moments(samples, mean, covariance, 0.15)
        return
    error, distance = (samples.mean(0) - mean).norm(), (prior.means[0] - mean).norm()
    limit = 0.25 if grade == "approximate" else 0.01
    left = float(error / distance)
    assert left < limit, f"{left:.2f} of the way from the prior's mean to the posterior's is left"


def _observation(guidance: Guidance, matrix: Tensor) -> tuple[Observation, Tensor]:
    """An observation that a method accepts and the matrix of its operator."""
    eye = torch.eye(D, dtype=torch.float64)
    reasons = []
    for rows, operator in ((matrix, Matrix(matrix)), (eye, Identity((D,)))):
        y = TRUTH @ rows.T + SIGMA_Y * torch.ones(1, len(rows), dtype=torch.float64)
        observation = Observation(y.repeat(POSTERIOR_COUNT, 1), SIGMA_Y, operator)
        try:
            guidance.check(observation)
        except ValueError as error:
            reasons.append(error)
        else:
            return observation, rows
    raise AssertionError(f"the method accepts neither a matrix nor the identity: {reasons}")


def _posterior(prior: Gaussian, matrix: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the covariance of p(x_0 | y) in closed form."""
    mean, covariance = prior.means[0], prior.covariances[0]
    noise = SIGMA_Y**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T + noise)
    return mean + gain @ (y - matrix @ mean), covariance - gain @ matrix @ covariance


def grade_operator(operator: Operator, shape: tuple[int, ...]) -> None:
    """Aᵀ is the adjoint of A, and the decomposition reproduces A; A is differentiable."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    a_x = operator(x)
    if isinstance(operator, LinearOperator):
        y = torch.randn(a_x.shape, dtype=torch.float64, generator=generator)
        left, right = (a_x * y).flatten(1).sum(1), (x * operator.adjoint(y)).flatten(1).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(operator(3 * x), 3 * a_x, rtol=1e-9, atol=1e-9)
    if isinstance(operator, SVDOperator):
        c = operator.vt(x)
        torch.testing.assert_close(operator.v(c), x, rtol=1e-9, atol=1e-9)
        s = operator.singular_values.to(x)
        torch.testing.assert_close(operator.u(s * c), a_x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(operator.ut(a_x), s * c, rtol=1e-6, atol=1e-5)
    x = (0.3 * x).requires_grad_()
    (gradient,) = torch.autograd.grad(operator(x).square().sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
    image = operator.to_image(operator(x.detach()))
    assert image.ndim == 4 and bool(image.isfinite().all())
