"""Gaussian mixtures against torch.distributions, autograd, and integrals on a grid."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from gaussian import COVARIANCE, MEAN
from mixture_distance import distance, floor
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from diffusion_lab.analytic import Gaussian, GaussianMixture
from diffusion_lab.schedule import VE, VP, Linear, Schedule, SubVP

LEVELS = [(0.9, math.sqrt(1 - 0.81)), (0.02, math.sqrt(1 - 0.0004)), (1.0, 0.3), (1.0, 50.0)]
every_level = pytest.mark.parametrize(
    "level", LEVELS, ids=lambda pair: f"{pair[0]}, {pair[1]:.3g}"
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def parameters(components: int, d: int, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means of standard deviation `spread`, and full covariances.

    The standard deviations of the components are about 0.2 to 1.
    """
    weights = torch.arange(1, components + 1, dtype=torch.float64)
    factors = normal(components, d, d, seed=1) / (2 * math.sqrt(d))
    covariances = factors @ factors.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    return weights / weights.sum(), spread * normal(components, d, seed=2), covariances


def mixture(components: int = 3, d: int = 4, spread: float = 1.5) -> GaussianMixture:
    return GaussianMixture(*parameters(components, d, spread))


def reference(
    alpha_t: float, sigma_t: float, components: int = 3, d: int = 4
) -> MixtureSameFamily:
    """p(x_t), built with torch.distributions."""
    weights, means, covariances = parameters(components, d)
    noise = sigma_t**2 * torch.eye(d, dtype=torch.float64)
    parts = MultivariateNormal(alpha_t * means, alpha_t**2 * covariances + noise)
    return MixtureSameFamily(Categorical(weights), parts)


def noisy(alpha_t: float, sigma_t: float, count: int = 6) -> Tensor:
    """Points x_t in regions of high density, and one point far away."""
    x_t = alpha_t * 2 * normal(count, 4) + sigma_t * normal(count, 4, seed=5)
    x_t[-1] *= 10
    return x_t


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# --- densities ----------------------------------------------------------------------------------


def test_log_prob_matches_torch_distributions() -> None:
    x = 2 * normal(50, 4)
    torch.testing.assert_close(
        mixture().log_prob(x), reference(1, 0).log_prob(x), rtol=1e-10, atol=1e-10
    )


@every_level
def test_log_prob_t_matches_torch_distributions(level: tuple[float, float]) -> None:
    x_t = noisy(*level)
    expected = reference(*level).log_prob(x_t)
    alpha_t, sigma_t = (number(c) for c in level)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(mixture().log_prob_t(x_t, alpha_t, sigma_t), expected, **close)
    each = mixture().log_prob_t(x_t, alpha_t.expand(6), sigma_t.expand(6))
    torch.testing.assert_close(each, expected, **close)
    torch.testing.assert_close(mixture().marginal(*level).log_prob(x_t), expected, **close)


def test_log_prob_t_accepts_one_level_per_point() -> None:
    x_t = normal(4, 4)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    expected = torch.stack([reference(*LEVELS[k]).log_prob(x_t[k]) for k in range(4)])
    torch.testing.assert_close(
        mixture().log_prob_t(x_t, levels[:, 0], levels[:, 1]), expected, rtol=1e-10, atol=1e-10
    )


def test_responsibilities_follow_bayes_rule() -> None:
    weights, means, covariances = parameters(3, 4)
    x = normal(20, 4)
    joint = np.stack(
        [
            float(w) * stats.multivariate_normal(m, s).pdf(x.numpy())
            for w, m, s in zip(weights, means.numpy(), covariances.numpy(), strict=True)
        ],
        axis=1,
    )
    expected = torch.from_numpy(joint / joint.sum(1, keepdims=True))
    torch.testing.assert_close(mixture().responsibilities(x), expected, rtol=1e-8, atol=1e-12)


def test_responsibilities_far_from_all_components_are_finite() -> None:
    r = mixture().responsibilities(1e4 * normal(5, 4))
    torch.testing.assert_close(r.sum(1), torch.ones(5, dtype=torch.float64))
    assert bool((r.amax(1) > 0.999).all())


# --- samples ------------------------------------------------------------------------------------


def test_samples_have_the_moments_of_the_mixture() -> None:
    n = 40_000
    weights, means, covariances = parameters(3, 4)
    x = mixture().sample(n, seeded())
    assert x.shape == (n, 4) and x.dtype == torch.float64
    mean = weights @ means
    deviations = means - mean
    between = torch.einsum("k,ki,kj->ij", weights, deviations, deviations)
    covariance = torch.einsum("k,kij->ij", weights, covariances) + between
    error = (covariance.diag() / n).sqrt()
    assert bool(((x.mean(0) - mean).abs() < 5 * error).all())
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    error = products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - covariance).abs() < 5 * error).all())


def test_samples_are_reproducible_with_a_seed() -> None:
    assert torch.equal(mixture().sample(7, seeded(3)), mixture().sample(7, seeded(3)))
    assert not torch.equal(mixture().sample(7, seeded(3)), mixture().sample(7, seeded(4)))
    torch.manual_seed(0)
    first = mixture().sample(7)
    assert not torch.equal(first, mixture().sample(7))
    torch.manual_seed(0)
    assert torch.equal(first, mixture().sample(7))


def test_whitened_samples_of_separate_components_are_standard_normal() -> None:
    prior, n = mixture(spread=30.0), 20_000
    x = prior.sample(n, seeded())
    z, k = prior.whitened(x)
    assert z.shape == (n, 4) and k.shape == (n,)
    for j in range(4):
        assert stats.kstest(z[:, j].numpy(), "norm").pvalue > 1e-3
    correlation = z.T @ z / n - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 * math.sqrt(2 / n)
    # The component is the nearest one, and |z| is the Mahalanobis distance to it.
    _, means, covariances = parameters(3, 4, spread=30.0)
    assert torch.equal(k, torch.cdist(x, means).argmin(1))
    difference = x - means[k]
    expected = (difference * torch.linalg.solve(covariances[k], difference)).sum(1)
    torch.testing.assert_close(z.square().sum(1), expected, rtol=1e-9, atol=1e-9)


# --- denoiser -----------------------------------------------------------------------------------


@every_level
def test_mean_t_matches_tweedies_formula(level: tuple[float, float]) -> None:
    """Tweedie's formula is E[x_0 | x_t] = (x_t + σ_t² ∇ log p(x_t)) / α_t."""
    (alpha_t, sigma_t), x_t = level, noisy(*level)
    levels = number(alpha_t), number(sigma_t)
    actual = mixture().mean_t(x_t, *levels)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for density in (reference(*level).log_prob, lambda x: mixture().log_prob_t(x, *levels)):
        expected = (x_t + sigma_t**2 * gradient(density, x_t)) / alpha_t
        torch.testing.assert_close(actual, expected, **close)


@pytest.mark.parametrize("level", [(0.8, 0.6), (1.0, 0.05), (1.0, 5.0), (0.7, 0.51)])
def test_mean_and_variance_match_integrals_in_one_dimension(level: tuple[float, float]) -> None:
    alpha_t, sigma_t = level
    weights, means, covariances = (p.numpy() for p in parameters(3, 1))
    x_0 = np.linspace(-12, 12, 40_001)
    prior = sum(
        w * stats.norm(m[0], math.sqrt(s[0, 0])).pdf(x_0)
        for w, m, s in zip(weights, means, covariances, strict=True)
    )
    x_t = np.array([-2.0, -0.3, 0.4, 1.7])
    posterior = prior * stats.norm(alpha_t * x_0, sigma_t).pdf(x_t[:, None])
    posterior /= posterior.sum(1, keepdims=True)
    mean = posterior @ x_0
    variance = posterior @ x_0**2 - mean**2
    levels, points = (number(alpha_t), number(sigma_t)), torch.from_numpy(x_t)[:, None]
    actual = mixture(3, 1).mean_t(points, *levels)[:, 0]
    np.testing.assert_allclose(actual.numpy(), mean, rtol=0, atol=1e-10)
    actual = mixture(3, 1).covariance_t(points, *levels)[:, 0, 0]
    np.testing.assert_allclose(actual.numpy(), variance, rtol=0, atol=1e-9)


def grid(side: int = 801, half: float = 8.0) -> np.ndarray:
    """Points of the plane, of shape (side², 2)."""
    axis = np.linspace(-half, half, side)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def prior_on(points: np.ndarray) -> np.ndarray:
    parts = zip(*(p.numpy() for p in parameters(3, 2)), strict=True)
    return sum(w * stats.multivariate_normal(m, s).pdf(points) for w, m, s in parts)


def moments_on(points: np.ndarray, density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = density / density.sum()
    mean = weights @ points
    return mean, (weights[:, None] * (points - mean)).T @ (points - mean)


@pytest.mark.parametrize("level", [(0.8, 0.6), (1.0, 2.0), (0.7, 0.51)])
def test_mean_and_covariance_match_integrals_in_two_dimensions(
    level: tuple[float, float],
) -> None:
    (alpha_t, sigma_t), points = level, grid()
    prior = prior_on(points)
    for x_t in ([0.3, -0.5], [2.0, 1.0]):
        noise = (np.array(x_t) - alpha_t * points) / sigma_t
        mean, covariance = moments_on(points, prior * np.exp(-0.5 * (noise**2).sum(1)))
        arguments = torch.tensor([x_t], dtype=torch.float64), number(alpha_t), number(sigma_t)
        actual = mixture(3, 2).mean_t(*arguments)[0]
        np.testing.assert_allclose(actual.numpy(), mean, rtol=0, atol=1e-9)
        actual = mixture(3, 2).covariance_t(*arguments)[0]
        np.testing.assert_allclose(actual.numpy(), covariance, rtol=0, atol=1e-9)


def test_mean_t_matches_importance_sampling() -> None:
    """The samples come from torch's mixture; the tolerance is five standard errors."""
    torch.manual_seed(0)
    x_0 = reference(1, 0, 3, 2).sample((200_000,))
    x_t, alpha_t, sigma_t = torch.tensor([0.4, -0.2], dtype=torch.float64), 0.8, 0.6
    weights = torch.softmax(-((x_t - alpha_t * x_0) ** 2).sum(1) / (2 * sigma_t**2), 0)
    mean = weights @ x_0
    error = (weights**2 @ (x_0 - mean) ** 2).sqrt()
    actual = mixture(3, 2).mean_t(x_t[None], number(alpha_t), number(sigma_t))[0]
    assert bool(((actual - mean).abs() < 5 * error).all()) and float(error.max()) < 0.01


@pytest.mark.parametrize(
    "schedule", [Linear(), VP(), SubVP(), VE()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("t", [0.01, 0.3, 1.0])
def test_denoiser_uses_the_levels_of_the_schedule(schedule: Schedule, t: float) -> None:
    alpha_t, sigma_t = (float(c) for c in schedule(number(t)))
    x_t = noisy(alpha_t, sigma_t)
    score = gradient(reference(alpha_t, sigma_t).log_prob, x_t)
    denoiser = mixture().denoiser(schedule)
    expected = (x_t + sigma_t**2 * score) / alpha_t
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(denoiser(x_t, number(t)), expected, **close)
    torch.testing.assert_close(
        sigma_t * denoiser.score(x_t, number(t)), sigma_t * score, rtol=1e-7, atol=1e-7
    )
    assert denoiser.schedule is schedule


def test_denoiser_accepts_one_time_per_point_and_any_batch_size() -> None:
    denoiser, x_t = mixture().denoiser(VE()), 3 * normal(5, 4)
    t = torch.tensor([0.05, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    together = denoiser(x_t, t)
    alone = torch.cat([denoiser(x_t[k : k + 1], t[k]) for k in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)
    same = denoiser(x_t, t[1])
    torch.testing.assert_close(same, denoiser(x_t, t[1].expand(5)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(same[2:4], denoiser(x_t[2:4], t[1]), rtol=1e-13, atol=1e-13)


def test_denoiser_returns_the_input_dtype_and_computes_in_float64() -> None:
    x_t, t = normal(5, 4).float(), torch.tensor(0.4)
    denoiser = mixture().denoiser(Linear())
    actual = denoiser(x_t, t)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, denoiser(x_t.double(), t.double()).float())
    single = GaussianMixture(*(p.float() for p in parameters(3, 4)))
    assert single.means.dtype == single.weights.dtype == torch.float64
    torch.testing.assert_close(single.denoiser(Linear())(x_t, t), actual, rtol=1e-5, atol=1e-5)


def test_mean_t_without_noise_is_the_scaled_point() -> None:
    x_t = noisy(1, 0)
    for sigma_t in (1e-6, 1e-12, 0.0):
        actual = mixture().mean_t(x_t, number(0.9), number(sigma_t))
        torch.testing.assert_close(actual, x_t / 0.9, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [(1.0, 1e10), (0.0, 1.0), (1e-13, 1.0), (0.0, 348.0)])
def test_moments_without_signal_are_those_of_the_prior(level: tuple[float, float]) -> None:
    weights, means, covariances = parameters(3, 4)
    alpha_t, sigma_t = (number(c) for c in level)
    x_t, mean = sigma_t * normal(5, 4), weights @ means
    actual = mixture().mean_t(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(actual, mean.expand(5, 4), rtol=1e-8, atol=1e-8)
    deviations = means - mean
    between = torch.einsum("k,ki,kj->ij", weights, deviations, deviations)
    expected = torch.einsum("k,kij->ij", weights, covariances) + between
    actual = mixture().covariance_t(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(actual, expected.expand(5, 4, 4), rtol=1e-8, atol=1e-8)


def test_mean_t_at_the_largest_level_of_ve() -> None:
    """For N(m, s), the mean is m + s (x_t - m) / (s + σ²)."""
    prior = Gaussian(torch.tensor([0.3]), torch.tensor([[0.25]]))
    x_t = torch.tensor([[500.0], [-200.0]], dtype=torch.float64)
    expected = 0.3 + 0.25 * (x_t - 0.3) / (0.25 + 348.0**2)
    actual = prior.mean_t(x_t, number(1.0), number(348.0))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)  # 0.3 was rounded to float32


@every_level
def test_covariance_t_is_the_scaled_jacobian_of_mean_t(level: tuple[float, float]) -> None:
    """Cov[x_0 | x_t] = σ_t² / α_t ∂ E[x_0 | x_t] / ∂ x_t."""
    alpha_t, sigma_t = (number(c) for c in level)
    x_t = noisy(*level)
    actual = mixture().covariance_t(x_t, alpha_t, sigma_t)
    for k in range(len(x_t)):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: mixture().mean_t(x[None], alpha_t, sigma_t)[0], x_t[k]
        )
        expected = sigma_t**2 / alpha_t * jacobian
        torch.testing.assert_close(actual[k], expected, rtol=1e-9, atol=1e-9)


def test_covariance_t_accepts_one_level_per_point() -> None:
    levels, x_t = torch.tensor(LEVELS, dtype=torch.float64), normal(4, 4)
    together = mixture().covariance_t(x_t, levels[:, 0], levels[:, 1])
    for k in range(4):
        alone = mixture().covariance_t(x_t[k : k + 1], *levels[k])
        torch.testing.assert_close(together[k], alone[0], rtol=1e-12, atol=1e-12)


# --- posterior ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix", [[[1.0, 0.0]], [[0.5, -1.0]], [[1.0, 2.0], [0.3, -0.4]], [[1, 0], [0, 1], [1, 1.0]]]
)
def test_posterior_matches_bayes_rule_on_a_grid(matrix: list[list[float]]) -> None:
    a, points, sigma_y = np.array(matrix), grid(), 0.5
    y = 0.4 * np.arange(1, len(a) + 1)
    density = prior_on(points) * np.exp(-(((y - points @ a.T) / sigma_y) ** 2).sum(1) / 2)
    cell = (points[1, 1] - points[0, 1]) ** 2
    posterior = mixture(3, 2).posterior(torch.from_numpy(y), torch.from_numpy(a), sigma_y)
    some = np.argsort(density)[-40_000::1000]
    actual = posterior.log_prob(torch.from_numpy(points[some])).exp()
    expected = density[some] / (density.sum() * cell)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-8)
    mean, covariance = moments_on(points, density)
    means, weights = posterior.means, posterior.weights
    np.testing.assert_allclose((weights @ means).numpy(), mean, rtol=0, atol=1e-8)
    second = torch.einsum("k,ki,kj->ij", weights, means, means)
    second += torch.einsum("k,kij->ij", weights, posterior.covariances)
    np.testing.assert_allclose(second - np.outer(mean, mean), covariance, rtol=0, atol=1e-8)


@pytest.mark.parametrize("m", [1, 3, 4, 6])
def test_posterior_of_one_gaussian_matches_the_closed_form(m: int) -> None:
    a, y, sigma_y = normal(m, 4, seed=7), normal(m, seed=8), 0.3
    precision = torch.linalg.inv(COVARIANCE)
    covariance = torch.linalg.inv(precision + a.T @ a / sigma_y**2)
    mean = covariance @ (precision @ MEAN + a.T @ y / sigma_y**2)
    posterior = Gaussian(MEAN, COVARIANCE).posterior(y, a, sigma_y)
    assert posterior.weights.tolist() == [1]
    torch.testing.assert_close(posterior.means[0], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.covariances[0], covariance, rtol=1e-10, atol=1e-10)


def test_posterior_without_noise_satisfies_the_observation() -> None:
    a, y = normal(2, 4, seed=7), normal(2, seed=8)
    posterior = mixture().posterior(y, a, 0.0)
    torch.testing.assert_close(posterior.sample(50, seeded()) @ a.T, y.expand(50, 2))
    nearly = mixture().posterior(y, a, 1e-5)
    torch.testing.assert_close(posterior.weights, nearly.weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(posterior.covariances, nearly.covariances, rtol=1e-6, atol=1e-6)
    assert posterior.singular
    with pytest.raises(ValueError, match="singular"):
        posterior.log_prob(normal(2, 4))
    with pytest.raises(ValueError, match="singular"):
        posterior.denoiser(VE())(normal(2, 4), number(0.0))
    assert bool(posterior.denoiser(VE())(normal(2, 4), number(0.1)).isfinite().all())


@pytest.mark.parametrize("level", [(1.0, 0.4), (0.8, 0.6), (0.7, 0.51)])
def test_denoising_equals_the_posterior_for_a_scaled_identity(level: tuple[float, float]) -> None:
    """With A = α_t I, σ_y = σ_t and y = x_t, the posterior has the moments of p(x_0 | x_t)."""
    alpha_t, sigma_t = (number(c) for c in level)
    x_t = normal(1, 4)
    a = alpha_t * torch.eye(4, dtype=torch.float64)
    posterior = mixture().posterior(x_t[0], a, float(sigma_t))
    mean = posterior.weights @ posterior.means
    torch.testing.assert_close(
        mean, mixture().mean_t(x_t, alpha_t, sigma_t)[0], rtol=1e-11, atol=1e-11
    )
    deviations = posterior.means - mean
    covariance = torch.einsum("k,ki,kj->ij", posterior.weights, deviations, deviations)
    covariance += torch.einsum("k,kij->ij", posterior.weights, posterior.covariances)
    expected = mixture().covariance_t(x_t, alpha_t, sigma_t)[0]
    torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=1e-10)


def test_two_successive_posteriors_equal_the_joint_posterior() -> None:
    a, y = normal(3, 4, seed=7), normal(3, seed=8)
    both = mixture().posterior(y, a, 0.3)
    twice = mixture().posterior(y[:1], a[:1], 0.3).posterior(y[1:], a[1:], 0.3)
    torch.testing.assert_close(twice.weights, both.weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twice.means, both.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twice.covariances, both.covariances, rtol=1e-9, atol=1e-9)


def test_conditional_denoiser_matches_stacked_observations() -> None:
    """E[x_0 | x_t, y] is the mean given both observations, stacked and scaled to equal noise."""
    a, y, sigma_y, t = normal(2, 4, seed=7), normal(2, seed=8), 0.3, number(0.3)
    x_t, schedule = normal(3, 4), Linear()
    alpha_t, sigma_t = schedule(t)
    actual = mixture().conditional_denoiser(schedule, y, a, sigma_y)(x_t, t)
    stacked = torch.cat([a / sigma_y, alpha_t / sigma_t * torch.eye(4, dtype=torch.float64)])
    for k in range(3):
        posterior = mixture().posterior(torch.cat([y / sigma_y, x_t[k] / sigma_t]), stacked, 1.0)
        expected = posterior.weights @ posterior.means
        torch.testing.assert_close(actual[k], expected, rtol=1e-9, atol=1e-9)


def test_posterior_for_a_function_matches_that_for_its_matrix() -> None:
    prior = GaussianMixture(*parameters(3, 8), shape=(2, 2, 2))
    y = normal(2, 1, 2, seed=8)
    by_function = prior.posterior(y, lambda x: x.mean(2, keepdim=True), 0.2)
    a = torch.zeros(4, 8, dtype=torch.float64)
    for row, (i, j) in enumerate(((0, 2), (1, 3), (4, 6), (5, 7))):
        a[row, i] = a[row, j] = 0.5
    by_matrix = prior.posterior(y.flatten(), a, 0.2)
    for name in ("weights", "means", "covariances"):
        torch.testing.assert_close(
            getattr(by_function, name), getattr(by_matrix, name), rtol=1e-12, atol=1e-12
        )
    assert by_function.shape == (2, 2, 2)


def test_log_weights_keep_components_with_underflowing_weights() -> None:
    """The second component has the weight e^-2500, which is zero in float64.

    Near that component, its log weight is needed for correct responsibilities.
    """
    weights, means = torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [100.0]])
    prior = GaussianMixture(weights, means, torch.ones(2, 1, 1))
    posterior = prior.posterior(torch.zeros(1), torch.eye(1), 1.0)
    assert posterior.weights.tolist() == [1, 0]
    # Evidence: N(0; 100, 1 + 1) against N(0; 0, 1 + 1).
    assert float(posterior.log_weights[1]) == pytest.approx(-(100**2) / 4, rel=1e-12)
    # The second component has mean 50 and variance 1/2. Both are equally likely at x_0 = 50.
    x = torch.tensor([[40.0], [60.0], [49.0], [51.0]], dtype=torch.float64)
    first, second = -(x**2), -2500 - (x - 50) ** 2
    expected = torch.softmax(torch.cat([first, second], 1), 1)
    torch.testing.assert_close(posterior.responsibilities(x), expected, rtol=1e-9, atol=1e-12)


# --- shapes and invalid arguments ---------------------------------------------------------------


def test_image_shape_gives_the_same_results_as_flat_points() -> None:
    flat = mixture(3, 12)
    image = GaussianMixture(*parameters(3, 12), shape=(3, 2, 2))
    x, t = normal(5, 12), torch.linspace(0.1, 0.9, 5).double()
    pictures = x.reshape(5, 3, 2, 2)
    assert torch.equal(image.sample(5, seeded()), flat.sample(5, seeded()).reshape(5, 3, 2, 2))
    assert torch.equal(image.log_prob(pictures), flat.log_prob(x))
    assert torch.equal(image.responsibilities(pictures), flat.responsibilities(x))
    assert torch.equal(image.whitened(pictures)[0], flat.whitened(x)[0])
    estimate = image.denoiser(Linear())(pictures, t)
    assert torch.equal(estimate, flat.denoiser(Linear())(x, t).reshape(5, 3, 2, 2))
    levels = Linear()(t)
    assert torch.equal(image.covariance_t(pictures, *levels), flat.covariance_t(x, *levels))
    assert image.marginal(0.8, 0.6).shape == (3, 2, 2) and flat.shape == (12,)
    with pytest.raises(ValueError, match=r"\(5, 12\); the mixture needs \(B, 3, 2, 2\)"):
        image.log_prob(x)
    single = Gaussian(MEAN, COVARIANCE, shape=(1, 2, 2))
    assert single.sample(3, seeded()).shape == (3, 1, 2, 2)


def test_point_mass_has_a_denoiser() -> None:
    prior = Gaussian(MEAN, torch.zeros(4, 4))
    actual = prior.denoiser(Linear())(normal(3, 4), number(0.5))
    torch.testing.assert_close(actual, MEAN.expand(3, 4), rtol=0, atol=1e-15)
    assert torch.equal(prior.sample(3, seeded()), MEAN.expand(3, 4))


def test_singular_covariance_in_float32_is_accepted() -> None:
    factor = normal(4, 2).float()
    prior = Gaussian(MEAN.float(), factor @ factor.T)
    torch.testing.assert_close(
        prior.covariances[0], (factor @ factor.T).double(), rtol=0, atol=1e-6
    )


WEIGHTS, MEANS, COVARIANCES = parameters(2, 3)
NAN = torch.tensor(float("nan"))
BAD = {
    "weights of another K": (
        (torch.ones(3) / 3, MEANS, COVARIANCES),
        {},
        "do not match",
    ),
    "another d": ((WEIGHTS, MEANS[:, :2], COVARIANCES), {}, "do not match"),
    "variances": ((WEIGHTS, MEANS, COVARIANCES[:, 0]), {}, "do not match"),
    "nothing": ((WEIGHTS[:0], MEANS[:0], COVARIANCES[:0]), {}, "do not match"),
    "a weight of 0": ((torch.tensor([0.0, 1.0]), MEANS, COVARIANCES), {}, "above 0"),
    "a negative weight": ((torch.tensor([-0.5, 1.5]), MEANS, COVARIANCES), {}, "above 0"),
    "a weight of nan": ((NAN * WEIGHTS, MEANS, COVARIANCES), {}, "above 0"),
    "sum": ((WEIGHTS * (1 + 3e-6), MEANS, COVARIANCES), {}, r"sum to 1.000003, not to 1"),
    "means of nan": ((WEIGHTS, NAN * MEANS, COVARIANCES), {}, "means must be finite"),
    "asymmetric": ((WEIGHTS, MEANS, COVARIANCES.triu()), {}, "finite and symmetric"),
    "covariances of nan": ((WEIGHTS, MEANS, NAN * COVARIANCES), {}, "finite and symmetric"),
    "indefinite": ((WEIGHTS, MEANS, -COVARIANCES), {}, "positive semidefinite; the smallest .* -"),
    "shape": ((WEIGHTS, MEANS, COVARIANCES), {"shape": (2, 2)}, r"shape=\(2, 2\) .* d=3"),
}


@pytest.mark.parametrize(("arguments", "options", "reason"), BAD.values(), ids=BAD.keys())
def test_invalid_mixture_is_an_error(arguments, options, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GaussianMixture(*arguments, **options)


def test_weights_are_normalized() -> None:
    rounded = GaussianMixture(WEIGHTS * (1 + 5e-7), MEANS, COVARIANCES)
    assert float(rounded.weights.sum()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    "operator", [torch.abs, torch.square, lambda x: x + 1, lambda x: x.clamp(-1, 1), torch.relu]
)
@pytest.mark.parametrize("d", [1, 4])
def test_nonlinear_function_is_an_error(operator, d: int) -> None:
    with pytest.raises(ValueError, match="not linear"):
        mixture(3, d).posterior(torch.zeros(d), operator, 0.1)


def test_mismatched_observation_is_an_error() -> None:
    y, a = torch.zeros(2), torch.eye(4)[:2]
    with pytest.raises(ValueError, match=r"shape \(2, 3\), not \(m, 4\)"):
        mixture().posterior(y, a[:, :3], 0.1)
    with pytest.raises(ValueError, match="y has 3 elements and the operator's output 2"):
        mixture().posterior(torch.zeros(3), a, 0.1)
    for sigma_y in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="sigma_y"):
            mixture().posterior(y, a, sigma_y)
    for flat in (torch.zeros(2, 4), torch.ones(2, 4), torch.eye(4)[[0, 1, 2, 3, 0]]):
        with pytest.raises(ValueError, match="must have an inverse"):
            mixture().posterior(torch.zeros(len(flat)), flat, 0.0)


# --- distance of samples to a mixture -----------------------------------------------------------

SEPARATE = mixture(spread=30.0)
COUNT = 20_000
LOWEST = cache(lambda: floor(SEPARATE, COUNT, seed=0))


@pytest.mark.slow
def test_distance_of_exact_samples_is_at_the_floor() -> None:
    lowest = LOWEST()
    assert lowest < 0.02
    for seed in range(5):
        shape, shares = distance(SEPARATE, SEPARATE.sample(COUNT, seeded(seed)), seed=seed)
        assert shape == pytest.approx(lowest, rel=0.3)
        assert shares < 5 * 0.5 / math.sqrt(COUNT)
    assert floor(SEPARATE, COUNT // 16, seed=0) > 3 * lowest  # the floor decreases about as 1 / √n


def test_distance_detects_a_wrong_scale() -> None:
    x = SEPARATE.sample(COUNT, seeded())
    lowest, centre = LOWEST(), SEPARATE.means[SEPARATE.whitened(x)[1]]
    for scale in (0.95, 1.05):
        shape, shares = distance(SEPARATE, centre + scale * (x - centre))
        assert shape > 2.5 * lowest and shape == pytest.approx(0.05, abs=lowest)
        assert shares < 0.02  # the weights are unaffected


def test_distance_detects_a_shift() -> None:
    """The samples are shifted by 0.1 standard deviations along every axis.

    A projection moves by 0.1 √d |cos| of the angle between its direction and the shift.
    """
    x = SEPARATE.sample(COUNT, seeded())
    z, k = SEPARATE.whitened(x)
    shifted = (z + 0.1) * SEPARATE.eigenvalues[k].sqrt()
    x = SEPARATE.means[k] + torch.einsum("bij,bj->bi", SEPARATE.axes[k], shifted)
    shape, _ = distance(SEPARATE, x)
    # In d = 4 dimensions E |cos| = Γ(2) / (√π Γ(5/2)) = 0.4244.
    assert shape == pytest.approx(0.2 * 0.4244, rel=0.15)
    assert shape > 4 * LOWEST()


def test_distance_detects_wrong_component_weights() -> None:
    weights, means, covariances = parameters(3, 4, spread=30.0)
    weights = weights + torch.tensor([0.05, 0, -0.05])
    x = GaussianMixture(weights, means, covariances).sample(COUNT, seeded())
    shape, shares = distance(SEPARATE, x)
    assert shares == pytest.approx(0.05, abs=0.015)
    assert shape == pytest.approx(LOWEST(), rel=0.3)  # the shape is unaffected
