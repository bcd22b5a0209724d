"""Priors of finitely many images: posterior moments against sums over the set."""

import pytest
import torch

from diffusion_lab.analytic import Atoms
from diffusion_lab.schedule import VE, Cosine, Linear

GENERATOR = torch.Generator().manual_seed(0)
POINTS = torch.randn(5, 2, 3, generator=GENERATOR, dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
PRIOR = Atoms(POINTS, WEIGHTS)


def log_prob_t(x_t: torch.Tensor, alpha_t: float, sigma_t: float) -> torch.Tensor:
    """log Σ w_i N(x_t; α_t a_i, σ_t² I), computed with torch.distributions."""
    normal = torch.distributions.Normal(alpha_t * POINTS, sigma_t)
    return (WEIGHTS.log() + normal.log_prob(x_t[:, None]).sum((2, 3))).logsumexp(1)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VE()])
@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_score_is_the_gradient_of_the_log_density(schedule, t: float) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    alpha_t, sigma_t = (float(c) for c in schedule(time))
    x_t = torch.randn(4, 2, 3, generator=GENERATOR, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob_t(x_t, alpha_t, sigma_t).sum(), x_t)
    score = PRIOR.denoiser(schedule).score(x_t.detach(), time)
    torch.testing.assert_close(score, gradient, rtol=1e-8, atol=1e-8)


def squared(x: torch.Tensor) -> torch.Tensor:
    """A nonlinear operator."""
    return (x**2).flatten(1)[:, :4]


def test_posterior_weights_follow_bayes_rule_for_a_nonlinear_operator() -> None:
    y, sigma_y = squared(POINTS[2:3]) + 0.1, 0.7
    likelihood = torch.distributions.Normal(squared(POINTS), sigma_y).log_prob(y).sum(1).exp()
    expected = WEIGHTS * likelihood / (WEIGHTS * likelihood).sum()
    torch.testing.assert_close(PRIOR.posterior(y[0], squared, sigma_y).weights, expected)


def test_conditional_denoiser_handles_one_observation_per_row() -> None:
    y = squared(POINTS) + 0.2
    t, x_t = torch.tensor(0.6), torch.randn(5, 2, 3, generator=GENERATOR, dtype=torch.float64)
    together = PRIOR.conditional_denoiser(Linear(), y, squared, 0.5)(x_t, t)
    for k in range(5):
        alone = PRIOR.conditional_denoiser(Linear(), y[k], squared, 0.5)(x_t[k : k + 1], t)
        torch.testing.assert_close(together[k : k + 1], alone)


def test_samples_follow_the_weights_and_have_the_right_responsibilities() -> None:
    x_0 = PRIOR.sample(20000, torch.Generator().manual_seed(1))
    shares = PRIOR.responsibilities(x_0 + 1e-3).mean(0)
    assert float((shares - WEIGHTS).abs().max()) < 0.015  # 4 standard errors
    assert bool((x_0[:, None] == POINTS).flatten(2).all(2).any(1).all())  # bitwise equal


def test_invalid_atoms_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"sum to .*0.9"):
        Atoms(POINTS, 0.9 * WEIGHTS)
    with pytest.raises(ValueError, match=r"shape \(4,\) for 5 points"):
        Atoms(POINTS, WEIGHTS[:4])
    with pytest.raises(ValueError, match="finite"):
        Atoms(POINTS / 0)
    with pytest.raises(ValueError, match="sigma_y=0"):
        PRIOR.posterior(squared(POINTS), squared, 0)
