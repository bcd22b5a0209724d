"""Likelihoods against closed forms: Gaussian pixels in bits, the mixture's density in nats."""

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
    """The nearest levels of N(μ + shift τ, (spread τ)²), uint8; none is at the range's end."""
    level = MU + TAU * (shift + spread * normal(count, *SHAPE))
    p = ((level + 1) * 127.5).round().clamp(0, 255).byte()
    assert float(((p == 0) | (p == 255)).double().mean()) < 1e-3
    return p


def exact_bits(pixels: Tensor, tau: float = TAU) -> Tensor:
    """-log2 of the probability that N(μ, τ²) falls nearest to the level, mean over the pixels."""
    low, high = (((pixels.double().numpy() + e) / 127.5 - 1) for e in (-0.5, 0.5))
    probability = norm.cdf(high, MU, tau) - norm.cdf(low, MU, tau)
    return torch.from_numpy(-np.log2(probability)).flatten(1).mean(1)


# --- bits per dimension -------------------------------------------------------------------------


class OffGenerator(KeyedGenerator):
    """Noise in [½, 1½) of a bin's width."""

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().uniform(*shape, dtype=dtype) + 0.5


@every_schedule
def test_the_flow_of_gaussian_pixels(schedule: str) -> None:
    """The pixels lie one τ beside the mean, where half a bin more or less is 0.02 bits."""
    p = pixels(16, shift=1.0, spread=0.3)
    denoiser, solver = PRIOR.denoiser(SCHEDULES[schedule]), ProbabilityFlow()
    bits = flow(denoiser, solver, p, streams(16))
    assert bits.dtype == torch.float64 and bits.shape == (16,)
    error = float((bits - exact_bits(p)).mean())
    assert abs(error) < 2e-3, error


def test_the_density_is_that_of_the_image_at_the_smallest_time() -> None:
    """Of x_t / α_t, not of x_t, where α is 0.994: it has noise of 0.11 beside the τ of 0.25."""
    schedule, p = VP(t_min=0.03), pixels(16, shift=1.0, spread=0.3)
    bits = flow(PRIOR.denoiser(schedule), ProbabilityFlow(), p, streams(16))
    expected = exact_bits(p, math.hypot(TAU, float(schedule.ratio(0.03))))
    assert abs(float((bits - expected).mean())) < 2e-3


def test_half_a_bin_more_would_be_seen() -> None:
    p = pixels(16, shift=1.0, spread=0.3)
    wrong = flow(PRIOR.denoiser(VP()), ProbabilityFlow(), p, OffGenerator(streams(16).key))
    assert abs(float((wrong - exact_bits(p)).mean())) > 1e-2


def test_the_exact_trace_of_gaussian_pixels() -> None:
    """The Jacobian is a multiple of I, of which Hutchinson's estimate is exact, too."""
    prior = Gaussian(torch.full((12,), MU), TAU**2 * torch.eye(12), shape=(3, 2, 2))
    p, denoiser = pixels(2)[:, :, :2, :2], prior.denoiser(VP())
    estimated, exact = (
        flow(denoiser, ProbabilityFlow(), p, streams(2), exact=exact) for exact in (False, True)
    )
    torch.testing.assert_close(exact, estimated, rtol=0, atol=1e-5)


def bound_in_closed_form(schedule: Schedule) -> float:
    """The expectation of DDPM's bound over the pixels of N(μ, τ²), term by term."""
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
    # -log of the softmax over levels j Δ, seen with noise n ~ N(0, r²) around level 0.
    n, j = np.linspace(-9, 9, 4001) * r[0], np.arange(-40, 41)
    logits = -((n[:, None] - j / 127.5) ** 2) / (2 * r[0] ** 2)
    largest = logits.max(1, keepdims=True)
    rest = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0] - logits[:, 40]
    decoder = np.average(rest, weights=norm.pdf(n / r[0]))
    return (kl + inner + decoder) / math.log(2)


@every_schedule
def test_the_bound_of_gaussian_pixels(schedule: str) -> None:
    """Above the exact value; under a thousand of DDPM's steps by much, in the limit by little."""
    p = pixels(256)
    bits = bound(PRIOR.denoiser(SCHEDULES[schedule]), p, streams(256), terms=100)
    expected = bound_in_closed_form(SCHEDULES[schedule])
    error = float(bits.std()) / math.sqrt(256)
    assert error < 0.02
    assert abs(float(bits.mean()) - expected) < 4 * error
    excess = bits - exact_bits(p)  # whose spread is less: both know the pixels
    error = float(excess.std()) / math.sqrt(256)
    assert float(excess.mean()) > -4 * error
    entropy = math.log2(127.5 * TAU * math.sqrt(2 * math.pi * math.e))
    if schedule in ("linear", "cosine"):
        assert 0.5 < expected - entropy < 0.7
    else:
        assert 0 < expected - entropy < 0.1
        assert float(excess.mean()) < 0.1 + 4 * error


def test_the_number_of_terms_changes_the_spread_and_not_the_mean() -> None:
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
    assert float(together[3]) == pytest.approx(float(alone[0]), rel=0, abs=1e-6)  # float32 in it


# --- densities ----------------------------------------------------------------------------------

WIDE = {"ve": VE(1e-3, 1000.0), "vp": VP(t_min=1e-5), "flow": FlowSchedule()}
every_wide = pytest.mark.parametrize("schedule", WIDE.values(), ids=WIDE.keys())


def points(schedule: Schedule, count: int, t: float | None = None) -> tuple[Tensor, Tensor]:
    """Draws of x_t, and log p(x_t)."""
    level = torch.tensor(schedule.t_min if t is None else t, dtype=torch.float64)
    alpha_t, sigma_t = schedule(level)
    x_0 = MIXTURE.sample(count, torch.Generator().manual_seed(3))
    x_t = alpha_t * x_0 + sigma_t * normal(count, D, seed=4)
    return x_t, MIXTURE.log_prob_t(x_t, alpha_t, sigma_t)


@every_wide
@pytest.mark.parametrize("t", [None, 0.3])
def test_the_density_of_the_mixture(schedule: Schedule, t: float | None) -> None:
    """But for what the start at t = 1 ignores, which is nothing under VE and Flow."""
    x_t, expected = points(schedule, 48, t)
    actual, _ = ProbabilityFlow().log_prob(MIXTURE.denoiser(schedule), x_t, t, exact=True)
    bits = (actual - expected) / (D * math.log(2))
    assert abs(float(bits.mean())) < 1e-3
    assert float(bits.abs().max()) < 1e-2


def test_only_the_start_is_missing_under_vp() -> None:
    """With the density of x_1 itself in place of N(0, I), each point is exact."""
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
def test_hutchinsons_estimate_has_the_right_mean(schedule: Schedule) -> None:
    """Of one point, over 300 directions."""
    x_t, expected = points(schedule, 1)
    estimates, _ = ProbabilityFlow().log_prob(
        MIXTURE.denoiser(schedule), x_t.repeat(300, 1), generator=streams(300, seed=5)
    )
    error = float(estimates.std()) / math.sqrt(300)
    assert 0.05 < error < 0.2
    assert abs(float(estimates.mean() - expected)) < 4 * error


@every_wide
def test_to_the_latent_and_back(schedule: Schedule) -> None:
    x, _ = points(schedule, 16)
    solver, denoiser = ProbabilityFlow(rtol=1e-6, atol=1e-6), MIXTURE.denoiser(schedule)
    latent = solver.integrate(denoiser, x, schedule.t_min, 1.0)
    spread = float(latent.square().mean().sqrt()) / schedule.prior_std
    assert abs(spread - 1) < 4 / math.sqrt(2 * latent.numel())
    back = solver.integrate(denoiser, latent, 1.0, schedule.t_min)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_densities_are_independent_of_the_batch(exact: bool) -> None:
    """Each point has its own steps and its own v of Hutchinson's estimator."""
    schedule, key = WIDE["vp"], make_key(6, torch.arange(5))
    x, _ = points(schedule, 5)
    x[0] *= 1.5  # needs other steps

    def density(chosen: list[int]) -> tuple[Tensor, Tensor]:
        return ProbabilityFlow().log_prob(
            MIXTURE.denoiser(schedule),
            x[chosen],
            exact=exact,
            generator=KeyedGenerator(key[chosen]),
        )

    for together, alone in zip(density([0, 1, 2, 3, 4]), density([3]), strict=True):
        torch.testing.assert_close(together[3], alone[0], rtol=0, atol=1e-10)
