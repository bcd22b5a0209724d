"""Likelihoods against closed forms: Gaussian pixels in bits, mixture densities in nats."""

import math

import numpy as np
import pytest
import torch
from sampler.problems import MIXTURE, D
from scipy.stats import norm
from torch import Tensor

from diffusion_lab.analytic import Gaussian
from diffusion_lab.likelihood import bound, flow
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import ProbabilityFlow
from diffusion_lab.schedule import EDM, VE, VP, Cosine, DiscreteSchedule, Linear, Schedule, SubVP
from diffusion_lab.schedule import Flow as FlowSchedule

SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VP(),
    "ve": VE(),
    "subvp": SubVP(),
    "flow": FlowSchedule(),
    "edm": EDM(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
SHAPE, MU, TAU = (3, 4, 4), -0.05, 0.25
PRIOR = Gaussian(torch.full((48,), MU), TAU**2 * torch.eye(48), shape=SHAPE)


def streams(count: int, seed: int = 0) -> KeyedGenerator:
    return KeyedGenerator(make_key(seed, torch.arange(count)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def pixels(count: int, shift: float = 0.0, spread: float = 1.0) -> Tensor:
    """Samples of N(μ + shift τ, (spread τ)²), rounded to uint8; few are 0 or 255."""
    level = MU + TAU * (shift + spread * normal(count, *SHAPE))
    p = ((level + 1) * 127.5).round().clamp(0, 255).byte()
    assert float(((p == 0) | (p == 255)).double().mean()) < 1e-3
    return p


def exact_bits(pixels: Tensor, tau: float = TAU) -> Tensor:
    """-log2 of the probability that N(μ, τ²) rounds to the level, averaged over the pixels."""
    low, high = (((pixels.double().numpy() + e) / 127.5 - 1) for e in (-0.5, 0.5))
    probability = norm.cdf(high, MU, tau) - norm.cdf(low, MU, tau)
    return torch.from_numpy(-np.log2(probability)).flatten(1).mean(1)


# --- bits per dimension -------------------------------------------------------------------------


class OffGenerator(KeyedGenerator):
    """A generator whose dequantization noise is wrong: in [½, 3/2) of a bin width."""

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().uniform(*shape, dtype=dtype) + 0.5


@every_schedule
def test_flow_likelihood_of_gaussian_pixels_is_exact(schedule: str) -> None:
    """The pixels are near μ + τ, where a shift of half a bin changes the bits by 0.02."""
    p = pixels(16, shift=1.0, spread=0.3)
    denoiser, solver = PRIOR.denoiser(SCHEDULES[schedule]), ProbabilityFlow()
    bits = flow(denoiser, solver, p, streams(16))
    assert bits.dtype == torch.float64 and bits.shape == (16,)
    error = float((bits - exact_bits(p)).mean())
    assert abs(error) < 2e-3, error


def test_flow_likelihood_is_the_density_of_x_t_over_alpha_at_t_min() -> None:
    """Here α_t = 0.994, and the noise in x_t / α_t is 0.11, in addition to τ = 0.25."""
    schedule, p = VP(t_min=0.03), pixels(16, shift=1.0, spread=0.3)
    bits = flow(PRIOR.denoiser(schedule), ProbabilityFlow(), p, streams(16))
    expected = exact_bits(p, math.hypot(TAU, float(schedule.ratio(0.03))))
    assert abs(float((bits - expected).mean())) < 2e-3


def test_flow_likelihood_detects_a_shift_of_half_a_bin() -> None:
    p = pixels(16, shift=1.0, spread=0.3)
    wrong = flow(PRIOR.denoiser(VP()), ProbabilityFlow(), p, OffGenerator(streams(16).key))
    assert abs(float((wrong - exact_bits(p)).mean())) > 1e-2


def test_exact_trace_equals_hutchinson_estimate_for_gaussian_pixels() -> None:
    """The Jacobian is a multiple of I, for which Hutchinson's estimate is exact."""
    prior = Gaussian(torch.full((12,), MU), TAU**2 * torch.eye(12), shape=(3, 2, 2))
    p, denoiser = pixels(2)[:, :, :2, :2], prior.denoiser(VP())
    estimated, exact = (
        flow(denoiser, ProbabilityFlow(), p, streams(2), exact=exact) for exact in (False, True)
    )
    torch.testing.assert_close(exact, estimated, rtol=0, atol=1e-5)


def bound_in_closed_form(schedule: Schedule) -> float:
    """The expectation of DDPM's bound over pixels of N(μ, τ²), summed term by term."""
    if isinstance(schedule, DiscreteSchedule):
        r = schedule.ratio(torch.arange(1, 1001, dtype=torch.float64) / 1000).numpy()
    else:
        low, high = schedule.ratio(torch.tensor([schedule.t_min, 1], dtype=torch.float64)).tolist()
        r = np.geomspace(max(low, 0.005), high, 1000)
    alpha, sigma = (float(c) for c in schedule(torch.ones((), dtype=torch.float64)))
    prior = 1.0 if schedule.variance_preserving else sigma**2
    of_square = alpha**2 * (MU**2 + TAU**2) / prior
    kl = 0.5 * (of_square + sigma**2 / prior - 1 - math.log(sigma**2 / prior))
    # E|x_0 - x̂|² = τ² / (1 + τ² SNR).
    snr = r**-2.0
    inner = np.sum((snr[:-1] - snr[1:]) / 2 * TAU**2 / (1 + TAU**2 * snr[1:]))
    # The decoder term is -log of the softmax over levels j Δ, with noise n ~ N(0, r²) around level
    # 0.
    n, j = np.linspace(-9, 9, 4001) * r[0], np.arange(-40, 41)
    logits = -((n[:, None] - j / 127.5) ** 2) / (2 * r[0] ** 2)
    largest = logits.max(1, keepdims=True)
    rest = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0] - logits[:, 40]
    decoder = np.average(rest, weights=norm.pdf(n / r[0]))
    return (kl + inner + decoder) / math.log(2)


@every_schedule
def test_bound_of_gaussian_pixels_matches_the_closed_form(schedule: str) -> None:
    """The bound is above the exact value.

    The gap is over 0.5 bits with 1000 steps of DDPM, and below 0.1 bits for continuous schedules.
    """
    p = pixels(256)
    bits = bound(PRIOR.denoiser(SCHEDULES[schedule]), p, streams(256), terms=100)
    expected = bound_in_closed_form(SCHEDULES[schedule])
    error = float(bits.std()) / math.sqrt(256)
    assert error < 0.02
    assert abs(float(bits.mean()) - expected) < 4 * error
    excess = bits - exact_bits(p)  # its variance is smaller, since both depend on the same pixels
    error = float(excess.std()) / math.sqrt(256)
    assert float(excess.mean()) > -4 * error
    entropy = math.log2(127.5 * TAU * math.sqrt(2 * math.pi * math.e))
    if schedule in ("linear", "cosine"):
        assert 0.5 < expected - entropy < 0.7
    else:
        assert 0 < expected - entropy < 0.1
        assert float(excess.mean()) < 0.1 + 4 * error


def test_number_of_terms_changes_only_the_variance_of_the_bound() -> None:
    p = pixels(256)
    few, many = (
        bound(PRIOR.denoiser(SCHEDULES["vp"]), p, streams(256, seed), terms=terms)
        for seed, terms in ((1, 1), (2, 64))
    )
    assert float(few.std()) > 1.5 * float(many.std())
    error = math.sqrt(float(few.var() + many.var()) / 256)
    assert abs(float(few.mean() - many.mean())) < 4 * error
    with pytest.raises(ValueError, match="terms=0"):
        bound(PRIOR.denoiser(SCHEDULES["vp"]), p, streams(256), terms=0)


@pytest.mark.parametrize("kind", ["flow", "bound"])
def test_bits_are_independent_of_the_batch(kind: str) -> None:
    p, denoiser = pixels(5), PRIOR.denoiser(SCHEDULES["vp"])
    key = make_key(3, torch.arange(5))

    def bits(chosen: list[int]) -> Tensor:
        generator = KeyedGenerator(key[chosen])
        if kind == "bound":
            return bound(denoiser, p[chosen], generator, terms=20)
        return flow(denoiser, ProbabilityFlow(), p[chosen], generator)

    together, alone = bits([0, 1, 2, 3, 4]), bits([3])
    # Part of the computation is float32.
    assert float(together[3]) == pytest.approx(float(alone[0]), rel=0, abs=1e-6)


# --- densities ----------------------------------------------------------------------------------

WIDE = {"ve": VE(1e-3, 1000.0), "vp": VP(t_min=1e-5), "flow": FlowSchedule()}
every_wide = pytest.mark.parametrize("schedule", WIDE.values(), ids=WIDE.keys())


def points(schedule: Schedule, count: int, t: float | None = None) -> tuple[Tensor, Tensor]:
    """Samples of x_t, and log p(x_t)."""
    level = torch.tensor(schedule.t_min if t is None else t, dtype=torch.float64)
    alpha_t, sigma_t = schedule(level)
    x_0 = MIXTURE.sample(count, torch.Generator().manual_seed(3))
    x_t = alpha_t * x_0 + sigma_t * normal(count, D, seed=4)
    return x_t, MIXTURE.log_prob_t(x_t, alpha_t, sigma_t)


@every_wide
@pytest.mark.parametrize("t", [None, 0.3])
def test_flow_density_of_the_mixture_matches_the_closed_form(
    schedule: Schedule, t: float | None
) -> None:
    """The flow assumes N(0, prior_std² I) at t = 1, which is the main source of error under VP."""
    x_t, expected = points(schedule, 48, t)
    actual, _ = ProbabilityFlow().log_prob(MIXTURE.denoiser(schedule), x_t, t, exact=True)
    bits = (actual - expected) / (D * math.log(2))
    assert abs(float(bits.mean())) < 1e-3
    assert float(bits.abs().max()) < 1e-2


def test_flow_density_error_under_vp_comes_only_from_the_prior_at_t_1() -> None:
    """If the exact density of x_1 replaces that of N(0, I), the density of each point is exact."""
    schedule = WIDE["vp"]
    x_t, expected = points(schedule, 8)
    solver = ProbabilityFlow(rtol=1e-7, atol=1e-7)
    actual, x_1 = solver.log_prob(MIXTURE.denoiser(schedule), x_t, exact=True)
    one = torch.ones((), dtype=torch.float64)
    assumed = torch.distributions.Normal(0.0, one).log_prob(x_1).sum(1)
    true = MIXTURE.log_prob_t(x_1, *schedule(one))
    assert float((true - assumed).abs().max()) > 1e-3
    torch.testing.assert_close(actual - assumed + true, expected, rtol=0, atol=2e-4)


@every_wide
def test_hutchinson_estimate_is_unbiased(schedule: Schedule) -> None:
    """The mean over 300 random directions at one point is compared with the closed form."""
    x_t, expected = points(schedule, 1)
    estimates, _ = ProbabilityFlow().log_prob(
        MIXTURE.denoiser(schedule), x_t.repeat(300, 1), generator=streams(300, seed=5)
    )
    error = float(estimates.std()) / math.sqrt(300)
    assert 0.05 < error < 0.2
    assert abs(float(estimates.mean() - expected)) < 4 * error


@every_wide
def test_flow_to_the_latent_and_back_restores_the_input(schedule: Schedule) -> None:
    x, _ = points(schedule, 16)
    solver, denoiser = ProbabilityFlow(rtol=1e-6, atol=1e-6), MIXTURE.denoiser(schedule)
    latent = solver.integrate(denoiser, x, schedule.t_min, 1.0)
    spread = float(latent.square().mean().sqrt()) / schedule.prior_std
    assert abs(spread - 1) < 4 / math.sqrt(2 * latent.numel())
    back = solver.integrate(denoiser, latent, 1.0, schedule.t_min)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_densities_are_independent_of_the_batch(exact: bool) -> None:
    """Each point has its own step sizes and its own direction v of Hutchinson's estimator."""
    schedule, key = WIDE["vp"], make_key(6, torch.arange(5))
    x, _ = points(schedule, 5)
    x[0] *= 1.5  # this point needs other step sizes

    def density(chosen: list[int]) -> tuple[Tensor, Tensor]:
        return ProbabilityFlow().log_prob(
            MIXTURE.denoiser(schedule),
            x[chosen],
            exact=exact,
            generator=KeyedGenerator(key[chosen]),
        )

    for together, alone in zip(density([0, 1, 2, 3, 4]), density([3]), strict=True):
        torch.testing.assert_close(together[3], alone[0], rtol=0, atol=1e-10)
