"""Samplers on a Gaussian prior: exact moments, formulas, and the steps of diffusers."""

import math
from functools import partial
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from gaussian import COVARIANCE, EIGENVALUES, MEAN, ROTATION, GaussianDenoiser, sampler_moments
from torch import Tensor

from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Sampler,
    State,
    UniPC,
)
from diffusion_lab.sampler.time_grid import Karras, Quadratic
from diffusion_lab.schedule import EDM, VE, VP, Cosine, Flow, Linear, Schedule, Sigmoid, SubVP
from diffusion_lab.tensor import broadcast
from diffusion_lab.transition import transition

SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "sigmoid": Sigmoid()}
CONTINUOUS = {"vp": VP(), "subvp": SubVP(), "ve": VE(), "edm": EDM(), "flow": Flow()}
ALL = {**SCHEDULES, **CONTINUOUS}
MAKERS = {
    "ddim": lambda steps, **kw: DDIM(steps, **kw),
    "ddim_0.5": lambda steps, **kw: DDIM(steps, eta=0.5, **kw),
    "small": lambda steps, **kw: Ancestral(steps, "small", **kw),
    "large": lambda steps, **kw: Ancestral(steps, "large", **kw),
    "euler_maruyama": lambda steps, **kw: EulerMaruyama(steps, **kw),
}
every_sampler = pytest.mark.parametrize("name", MAKERS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
any_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def time(index: float, steps: int = 1000) -> Tensor:
    """The time of DDPM's index; index -1 is the clean image."""
    return torch.tensor((index + 1) / steps, dtype=torch.float64)


class NotCalled(Denoiser):
    """A denoiser that must not be called, for steps that are given their estimate."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError(f"asked at t={float(t)}")


def one_step(
    sampler: Sampler, schedule: Schedule, x_t: Tensor, denoised: Tensor, t: Tensor, s: Tensor,
    z: Tensor,
) -> Tensor:  # fmt: skip
    """x_s after one step; z is the only noise, and a deterministic sampler gets none."""
    draws = [z] if sampler.stochastic else []

    def noise(x: Tensor) -> Tensor:
        assert x.shape == z.shape and x.dtype == z.dtype
        return draws.pop()

    state = State(float(t), x_t, denoised)
    return sampler.step(NotCalled(schedule), state, s.double(), noise)


class Isotropic(Denoiser):
    """E[x_0 | x_t] for x_0 ~ N(μ, ν I), for any trailing shape."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t))
        mean, variance = 0.4, 0.2
        gain = alpha_t * variance / (alpha_t**2 * variance + sigma_t**2)
        return mean + gain * (x_t - alpha_t * mean)


# --- moments of the output ----------------------------------------------------------------------


def errors(sampler: Sampler, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Error of the mean, and relative errors of the variances along C's principal axes."""
    denoiser = GaussianDenoiser(schedule)
    mean, covariance = sampler_moments(sampler, denoiser, *denoiser.marginal(1.0))
    rotated = ROTATION.T @ covariance @ ROTATION
    off_diagonal = rotated - rotated.diag().diag()
    assert float(off_diagonal.abs().max()) < 1e-10  # the principal axes are exact
    return mean - MEAN, rotated.diag() / EIGENVALUES - 1


@every_schedule
@every_sampler
def test_samples_converge_to_the_prior(name: str, schedule: Schedule) -> None:
    """With 512 steps, variance errors are below 2.5% (5% for the small variance and η = 0.5).

    The errors halve when the number of steps doubles.
    """
    mean, coarse = errors(MAKERS[name](256), schedule)
    mean_2, fine = errors(MAKERS[name](512), schedule)
    assert float(fine.abs().max()) < (0.05 if name in ("small", "ddim_0.5") else 0.025)
    ratio = float(coarse.norm() / fine.norm())
    assert 1.65 < ratio < 2.3  # first order
    if name == "euler_maruyama":  # the only sampler whose mean is not exact
        assert 1.9 < float(mean.norm() / mean_2.norm()) < 2.1
        assert float(mean_2.abs().max()) < 1e-3
    else:
        assert float(mean.abs().max()) < 1e-9


@every_schedule
@pytest.mark.parametrize("steps", [64, 256])
def test_sign_of_the_variance_error_of_each_sampler(schedule: Schedule, steps: int) -> None:
    sides = {name: errors(make(steps), schedule)[1] for name, make in MAKERS.items()}
    assert bool((sides["euler_maruyama"] > 0).all()) and bool((sides["large"] > 0).all())
    for name in ("small", "ddim", "ddim_0.5"):
        assert bool((sides[name] < 0).all()), name
    assert bool((sides["small"] < sides["ddim_0.5"]).all())  # more noise needs more steps
    assert bool((sides["ddim_0.5"] < sides["ddim"]).all())


def test_start_from_standard_noise_adds_only_a_small_error() -> None:
    """x_1 is not exactly N(0, I): with α_1 = 6e-3, the linear schedule keeps part of the mean."""
    denoiser = GaussianDenoiser(Linear())
    start = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    mean, _ = sampler_moments(Ancestral(200), denoiser, *start)
    assert 1e-8 < float((mean - MEAN).abs().max()) < 2e-5
    mean, _ = sampler_moments(DDIM(200), denoiser, *start)
    assert 1e-4 < float((mean - MEAN).abs().max()) < 6e-3


# --- single steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("index", [1, 37, 500, 999])
def test_ancestral_step_matches_ddpm(variance: str, index: int) -> None:
    """1/√a_t (x_t - β_t / √(1 - ᾱ_t) ε̂) + s_t z, with s_t² = β̃_t or β_t."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    b, ab, ab_before = beta[index], alpha_bar[index], alpha_bar[index - 1]
    x_t, epsilon, z = normal(3, 6, 4)
    denoised = (x_t - (1 - ab) ** 0.5 * epsilon) / ab**0.5
    s_t = (b * (1 - ab_before) / (1 - ab) if variance == "small" else b) ** 0.5
    expected = (x_t - b / (1 - ab) ** 0.5 * epsilon) / (1 - b) ** 0.5 + s_t * z
    t, s = time(index), time(index - 1)
    actual = one_step(Ancestral(variance=variance), Linear(), x_t, denoised, t, s, z)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("t, s", [(1.0, 0.98), (0.61803, 0.3), (0.002, 0.001), (0.3, 0.0)])
def test_ddim_with_eta_one_equals_the_small_variance_step(t: float, s: float) -> None:
    x_t, denoised, z = normal(3, 6, 4)
    for schedule in ALL.values():
        arguments = (schedule, x_t, denoised, *torch.tensor([t, s]).double(), z)
        actual = one_step(DDIM(eta=1.0), *arguments)
        expected = one_step(Ancestral(), *arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@any_schedule
def test_ddim_with_eta_zero_keeps_epsilon(schedule: Schedule) -> None:
    """x_t = α_t x_0 + σ_t ε becomes α_s x_0 + σ_s ε, for any t and s."""
    x_0, epsilon, z = normal(3, 6, 4)
    for t, s in ((0.9, 0.2), (0.3, 0.0), (1.0, 0.5)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedule(torch.tensor(u, dtype=torch.float64)) for u in (t, s)
        )
        x_t = alpha_t * x_0 + sigma_t * epsilon
        actual = one_step(DDIM(), schedule, x_t, x_0, *torch.tensor([t, s]).double(), z)
        torch.testing.assert_close(actual, alpha_s * x_0 + sigma_s * epsilon)


def test_euler_maruyama_matches_the_standard_scheme_for_constant_g() -> None:
    """x - [f x - g² score] (t - s) + g √(t - s) z, within one interval of the table."""
    schedule = Linear(steps=50, beta_max=0.3)
    x_t, denoised, z = normal(3, 6, 4)
    t, s = time(20.9, 50), time(20.2, 50)
    alpha_t, sigma_t = schedule(t)
    f, g, dt = schedule.drift(t), schedule.diffusion(t), t - s
    score = (alpha_t * denoised - x_t) / sigma_t**2
    expected = x_t - (f * x_t - g**2 * score) * dt + g * dt.sqrt() * z
    actual = one_step(EulerMaruyama(), schedule, x_t, denoised, t, s, z)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class Counting(Isotropic):
    """Counts the calls by time."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t))
        return super().forward(x_t, t)


def formula_step(
    sampler: Sampler, schedule: Schedule, x_t: Tensor, t: float, s: float, noises: Tensor
) -> tuple[Tensor, list[float]]:
    """x_s by the sampler from given noise, all of which it must use, and the calls of the step."""
    denoiser, draws = Counting(schedule), list(noises)
    time_t, time_s = torch.tensor([t, s], dtype=torch.float64)
    state = State(t, x_t, denoiser(x_t, time_t))
    denoiser.times.clear()
    x_s = sampler.step(denoiser, state, time_s, lambda x: draws.pop(0))
    assert not draws
    return x_s, denoiser.times


def score(schedule: Schedule, x: Tensor, t: float) -> Tensor:
    """The score of N(α_t μ, (α_t² ν + σ_t²) I), the density of x_t under `Isotropic`."""
    alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
    return (0.4 * alpha_t - x) / (0.2 * alpha_t**2 + sigma_t**2)


@any_schedule
@pytest.mark.parametrize("t, s", [(1.0, 0.98), (0.6, 0.3), (0.02, 0.01)])
def test_reverse_diffusion_step_matches_its_formula(
    schedule: Schedule, t: float, s: float
) -> None:
    """(2 - a) x_t + v ∇ log p(x_t) + √v z, with a = α_t / α_s and v = σ_t² - a² σ_s²."""
    x_t, z = normal(2, 6, 4)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        schedule(torch.tensor(u, dtype=torch.float64)) for u in (t, s)
    )
    a = alpha_t / alpha_s
    v = sigma_t**2 - a**2 * sigma_s**2
    expected = (2 - a) * x_t + v * score(schedule, x_t, t) + v.sqrt() * z
    actual, calls = formula_step(ReverseDiffusion(), schedule, x_t, t, s, z[None])
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    assert calls == []


@any_schedule
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (0.6, 0.3)])
def test_predictor_corrector_step_matches_its_formula(
    schedule: Schedule, count: int, t: float, s: float
) -> None:
    """A predictor step, then x + δ ∇ log p(x_s) + √(2 δ) z with δ = 2 α_t / α_s (snr σ_s)²."""
    snr = 0.2
    x_t, *noises = normal(2 + count, 6, 4)
    x, _ = formula_step(ReverseDiffusion(), schedule, x_t, t, s, torch.stack(noises[:1]))
    (alpha_t, _), (alpha_s, sigma_s) = (
        schedule(torch.tensor(u, dtype=torch.float64)) for u in (t, s)
    )
    delta = 2 * alpha_t / alpha_s * snr**2 * sigma_s**2
    for z in noises[1:]:
        x = x + delta * score(schedule, x, s) + (2 * delta).sqrt() * z
    sampler = PredictorCorrector(langevin_steps=count, snr=snr)
    actual, calls = formula_step(sampler, schedule, x_t, t, s, torch.stack(noises))
    torch.testing.assert_close(actual, x, rtol=1e-7, atol=1e-9)
    assert calls == [s] * count


@any_schedule
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("t, s", [(1.0, 0.9), (0.6, 0.3), (0.1, 0.0)])
def test_annealed_langevin_step_matches_its_formula(
    schedule: Schedule, count: int, t: float, s: float
) -> None:
    """Steps of δ = 2 (snr σ_t)² at t; x_t α_s / α_t starts the next level, x̂ is the result."""
    snr = 0.2
    x_t, *noises = normal(1 + count, 6, 4)
    (alpha_t, sigma_t), (alpha_s, _) = (
        schedule(torch.tensor(u, dtype=torch.float64)) for u in (t, s)
    )
    delta, x = 2 * snr**2 * sigma_t**2, x_t
    for z in noises:
        x = x + delta * score(schedule, x, t) + (2 * delta).sqrt() * z
    # Tweedie's formula, x̂ = (x_t + σ_t² ∇ log p(x_t)) / α_t, in the last step.
    x = alpha_s / alpha_t * x if s else (x + sigma_t**2 * score(schedule, x, t)) / alpha_t
    sampler = AnnealedLangevin(langevin_steps=count, snr=snr)
    actual, calls = formula_step(sampler, schedule, x_t, t, s, torch.stack(noises))
    torch.testing.assert_close(actual, x, rtol=1e-7, atol=1e-9)
    assert calls == [t] * (count - 1 + (s == 0))


def test_number_of_calls_of_langevin_samplers() -> None:
    """N steps: N (M + 1) - M calls with a corrector, which the last step omits, and N M + 1."""
    for sampler, expected in (
        (ReverseDiffusion(7), 7),
        (PredictorCorrector(7, langevin_steps=3), 7 * 4 - 3),
        (PredictorCorrector(7), 7 * 2 - 1),
        (AnnealedLangevin(7, 4), 7 * 4 + 1),
    ):
        denoiser = Counting(VP())
        sampler(denoiser, normal(3, 4), generator=torch.Generator().manual_seed(0))
        assert len(denoiser.times) == expected, sampler


@any_schedule
@every_sampler
def test_last_step_returns_the_estimate_without_noise(name: str, schedule: Schedule) -> None:
    x_t, denoised, z = normal(3, 6, 4)
    sampler, arguments = MAKERS[name](10), (schedule, x_t, denoised, time(4))
    step = one_step(sampler, *arguments, time(-1), 100 * z)
    torch.testing.assert_close(step, denoised, rtol=1e-12, atol=1e-12)
    before = one_step(sampler, *arguments, time(0), 100 * z)
    same = one_step(sampler, *arguments, time(0), 0 * z)
    assert torch.equal(before, same) == (name == "ddim")  # all other samplers add noise here


@any_schedule
@pytest.mark.parametrize("t, s", [(1.0, 0.98), (0.61803, 0.3), (0.002, 0.001)])
def test_ancestral_step_matches_bayes_rule(schedule: Schedule, t: float, s: float) -> None:
    """p(x_s | x_t, x_0), by adding the precisions of q(x_s | x_0) and q(x_t | x_s)."""
    x_t, x_0, z = normal(3, 6, 4)
    time_t, time_s = torch.tensor([t, s], dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(time_t), schedule(time_s)
    a = alpha_t / alpha_s
    v = sigma_t**2 - a**2 * sigma_s**2
    precision = sigma_s**-2 + a**2 / v
    mean = (alpha_s * x_0 / sigma_s**2 + a * x_t / v) / precision
    for variance, std in (("small", precision**-0.5), ("large", v.sqrt())):
        actual = one_step(Ancestral(5, variance), schedule, x_t, x_0, time_t, time_s, z)
        torch.testing.assert_close(actual, mean + std * z, rtol=1e-7, atol=1e-7)


@any_schedule
def test_transition_variance_matches_the_sde(schedule: Schedule) -> None:
    """v = ∫_s^t (α_t / α_u)² g(u)² du, also accurate for small steps."""
    for t, s in ((0.5, 0.4), (0.9, 0.2), (0.3, 0.3 - 1e-6)):
        u = torch.linspace(s, t, 200_001, dtype=torch.float64)
        alpha, _ = schedule(u)
        middle = (u[1:] + u[:-1]) / 2
        kernel = (alpha[-1] / schedule(middle)[0] * schedule.diffusion(middle)) ** 2
        expected = float(kernel.mean() * (u[-1] - u[0]))
        alpha_s, sigma_s, alpha_t, sigma_t, v = transition(schedule, t, s)
        assert float(v) == pytest.approx(expected, rel=1e-6)
        for actual, wanted in zip(
            (alpha_s, sigma_s, alpha_t, sigma_t), (*schedule(u[0]), *schedule(u[-1])), strict=True
        ):
            assert actual.dtype == torch.float64 and float(actual) == float(wanted)


# --- diffusers ----------------------------------------------------------------------------------


def with_float64_tables(scheduler):
    """Replaces the float32 tables, in which 1 - ᾱ and β have 3 digits at small t."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas_cumprod = beta, (1 - beta).cumprod(0)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def epsilon_and_estimate(x_t: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """A network output ε̂ and its estimate x̂, part of which is outside [-1, 1]."""
    alpha_t, sigma_t = Linear()(time(index))
    denoised = 1.2 * normal(*x_t.shape, seed=5)
    assert float(denoised.abs().max()) > 1
    return (x_t - alpha_t * denoised) / sigma_t, denoised


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("index, stride", [(999, 1), (412, 1), (1, 1), (0, 1), (980, 20), (0, 20)])
def test_ancestral_steps_match_diffusers(
    variance: str, clip: bool, index: int, stride: int
) -> None:
    scheduler = with_float64_tables(
        diffusers.DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=clip)
    )
    scheduler.set_timesteps(1000 // stride)
    x_t = normal(8, 4)
    epsilon, denoised = epsilon_and_estimate(x_t, index)
    expected = scheduler.step(
        epsilon, index, x_t, generator=torch.Generator().manual_seed(3)
    ).prev_sample
    z = normal(8, 4, seed=3)
    t, s = time(index), time(max(index - stride, -1))
    denoised = denoised.clamp(-1, 1) if clip else denoised
    actual = one_step(Ancestral(variance=variance), Linear(), x_t, denoised, t, s, z)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("index", [980, 500, 20, 0])
def test_ddim_steps_match_diffusers(eta: float, clip: bool, index: int) -> None:
    """The grid is `leading`; diffusers is wrong on others (huggingface/diffusers#9261)."""
    scheduler = with_float64_tables(diffusers.DDIMScheduler(clip_sample=clip))
    scheduler.set_timesteps(50)
    assert index in scheduler.timesteps
    x_t, z = normal(2, 8, 4)
    epsilon, denoised = epsilon_and_estimate(x_t, index)
    expected = scheduler.step(
        epsilon, index, x_t, eta=eta, use_clipped_model_output=clip, variance_noise=z
    ).prev_sample
    t, s = time(index), time(max(index - 20, -1))
    denoised = denoised.clamp(-1, 1) if clip else denoised
    actual = one_step(DDIM(eta=eta), Linear(), x_t, denoised, t, s, z)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- sampling loop ------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("t_start", [1.0, 0.3])
def test_default_grid_decreases_uniformly_from_the_start_to_zero(
    name: str, t_start: float
) -> None:
    for schedule in ALL.values():
        times = MAKERS[name](7).times(schedule, t_start)
        assert times.dtype == torch.float64
        expected = np.linspace(t_start, 0, 8)
        np.testing.assert_allclose(times.numpy(), expected, rtol=0, atol=1e-15)
        assert float(times[0]) == t_start and float(times[-1]) == 0.0


@every_sampler
def test_given_grid_replaces_the_uniform_grid(name: str) -> None:
    sampler, states = MAKERS[name](5, grid=Quadratic()), list[State]()
    expected = [0.8 * (1 - k / 5) ** 2 for k in range(6)]
    assert sampler.times(Cosine(), 0.8).tolist() == pytest.approx(expected, rel=1e-12)
    sampler(GaussianDenoiser(Cosine()), normal(3, 4), t_start=0.8, callback=states.append)
    assert [s.t for s in states] == pytest.approx(expected, rel=1e-12)


@every_sampler
def test_a_thousand_steps_visit_every_index(name: str) -> None:
    index = Linear().index(MAKERS[name](1000).times(Linear())[:-1])
    expected = torch.arange(999, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(index, expected, rtol=0, atol=1e-9)


@every_sampler
def test_callback_gets_the_state_before_every_step_and_at_the_end(name: str) -> None:
    denoiser, states = GaussianDenoiser(Cosine()), list[State]()
    sampler, start = MAKERS[name](5), normal(3, 4)
    generator = torch.Generator().manual_seed(0)
    result = sampler(denoiser, start, t_start=0.8, generator=generator, callback=states.append)
    assert [s.t for s in states] == sampler.times(Cosine(), 0.8).tolist()
    assert torch.equal(states[0].x_t, start)
    for state in states[:-1]:
        t = torch.tensor(state.t, dtype=torch.float64)
        assert torch.equal(state.denoised, denoiser(state.x_t, t))
    assert torch.equal(states[-1].x_t, result) and torch.equal(states[-1].denoised, result)
    again = sampler(denoiser, start, t_start=0.8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, result)  # the callback does not change the result
    generator = torch.Generator().manual_seed(0)
    times = sampler.times(Cosine(), 0.8)
    for k, state in enumerate(states[:-1]):  # consecutive states are one step apart
        z = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        arguments = (state.x_t, state.denoised, times[k], times[k + 1], z)
        x_s = one_step(sampler, Cosine(), *arguments)
        assert torch.equal(x_s, states[k + 1].x_t)
        assert state.previous is None  # all of these are one-step samplers


@pytest.mark.parametrize("length", [0, 1, 2])
def test_state_has_as_many_previous_states_as_the_sampler_needs(length: int) -> None:
    class Remembering(DDIM):
        history = length

    states = list[State]()
    Remembering(5)(GaussianDenoiser(Cosine()), normal(3, 4), callback=states.append)
    for k, state in enumerate(states[:-1]):
        before = []
        while state.previous is not None:
            state = state.previous
            before.append(state)
        assert [s.t for s in before] == [states[j].t for j in reversed(range(k))][:length]
        for j, state in enumerate(before, start=1):
            assert torch.equal(state.x_t, states[k - j].x_t)
            assert torch.equal(state.denoised, states[k - j].denoised)


@every_sampler
def test_adjust_changes_the_state_after_every_step(name: str) -> None:
    """The reference adds (1 - x_t) / 10 to x_s; the callback gets the adjusted state."""
    denoiser, states, seen = GaussianDenoiser(Cosine()), list[State](), []

    def adjust(state: State, x_s: Tensor) -> Tensor:
        seen.append((state, x_s))
        return x_s + 0.1 * (1 - state.x_t)

    sampler, x_t = MAKERS[name](5), normal(3, 4)
    generator = torch.Generator().manual_seed(0)
    result = sampler(denoiser, x_t, generator=generator, callback=states.append, adjust=adjust)
    generator = torch.Generator().manual_seed(0)
    for k, (t, s) in enumerate(pairwise(sampler.times(Cosine()))):
        z = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        x_s = one_step(sampler, Cosine(), x_t, denoiser(x_t, t), t, s, z)
        assert torch.equal(seen[k][0].x_t, x_t) and torch.equal(seen[k][1], x_s)
        assert seen[k][0].t == float(t) == states[k].t
        x_t = x_s + 0.1 * (1 - x_t)
        assert torch.equal(states[k + 1].x_t, x_t)
    assert len(seen) == 5 and torch.equal(result, x_t)
    assert torch.equal(states[-1].denoised, result)


@every_sampler
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    denoiser, key = GaussianDenoiser(Linear()), make_key(0, "sample", torch.arange(6))

    def samples(chosen: list[int]) -> Tensor:
        generator = KeyedGenerator(key[chosen])
        start = generator.normal(4, dtype=torch.float64)
        return MAKERS[name](20)(denoiser, start, generator=generator)

    whole = samples([0, 1, 2, 3, 4, 5])
    assert float(whole.std(0).min()) > 0.05
    for chosen in ([3], [5, 0], [4, 3, 2]):
        torch.testing.assert_close(samples(chosen), whole[chosen], rtol=1e-12, atol=1e-12)


@every_sampler
def test_samples_are_equal_for_vectors_and_images(name: str) -> None:
    start = normal(2, 12)
    results = [
        MAKERS[name](10)(
            Isotropic(Sigmoid()),
            start.reshape(2, *shape),
            generator=torch.Generator().manual_seed(1),
        )
        for shape in ((12,), (3, 2, 2), (3, 4))
    ]
    for result, shape in zip(results, ((12,), (3, 2, 2), (3, 4)), strict=True):
        assert result.shape == (2, *shape)
        assert torch.equal(result.flatten(1), results[0])


@every_sampler
def test_state_keeps_the_dtype_of_the_start(name: str) -> None:
    single, double = (
        MAKERS[name](30)(
            Isotropic(Linear()), start, generator=KeyedGenerator(make_key(0, torch.arange(4)))
        )
        for start in (normal(4, 5).float(), normal(4, 5))
    )
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@every_sampler
def test_clip_equals_sampling_with_a_clipped_denoiser(name: str) -> None:
    start, denoiser = 2 * normal(50, 4), GaussianDenoiser(Linear(), 2 * MEAN, COVARIANCE)
    plain, clipped, wrapped = (
        MAKERS[name](20, clip=clip)(prior, start, generator=torch.Generator().manual_seed(0))
        for clip, prior in ((False, denoiser), (True, denoiser), (False, Clipped(denoiser)))
    )
    assert torch.equal(clipped, wrapped)
    assert float(plain.abs().max()) > 1.2 and float(clipped.abs().max()) <= 1 + 1e-9


def test_stochastic_attribute_matches_the_use_of_noise() -> None:
    denoiser, start = GaussianDenoiser(Linear()), normal(3, 4)
    for make in MAKERS.values():
        sampler = make(5)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        before = generators[0].get_state()
        one, two = (sampler(denoiser, start, generator=generator) for generator in generators)
        assert sampler.stochastic == (not torch.equal(one, two))
        # A deterministic sampler draws no random numbers.
        assert sampler.stochastic == (not torch.equal(generators[0].get_state(), before))


def test_samples_require_no_grad() -> None:
    start = normal(1, 4).requires_grad_()
    assert not DDIM(2)(GaussianDenoiser(Linear()), start).requires_grad


# --- errors --------------------------------------------------------------------------------------


class Broken(Denoiser):
    """A denoiser whose estimate is zero, except for the last image of a batch at t <= `until`.

    Arguments:
        schedule: The schedule.
        until: The largest time at which it fails.
        values: Its outputs there, repeated twice.
    """

    def __init__(self, schedule: Schedule, until: float, *values: float) -> None:
        super().__init__(schedule)
        self.until, self.values = until, torch.tensor(values, dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoised = torch.zeros_like(x_t)
        if float(t) <= self.until:
            denoised[-1] = self.values.repeat(2).to(x_t)
        return denoised


@every_sampler
@pytest.mark.parametrize("values", [(math.nan, 0), (math.inf, 0), (-math.inf, math.inf)])
def test_non_finite_state_stops_the_sampler(name: str, values: tuple) -> None:
    """One non-finite value of one image is enough, and the error names the step."""
    sampler, states = MAKERS[name](10), list[State]()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(SamplingError) as caught:
        sampler(
            Broken(Linear(), 0.36, *values), normal(3, 4), t_start=0.5, generator=generator,
            callback=states.append,
        )  # fmt: skip
    assert str(caught.value) == (
        f"{type(sampler).__name__}: x_t is not finite after step 4 of 10 (from t=0.35 to 0.3). "
        "Check that the denoiser is trained at this noise level, or use more steps, another grid "
        "or clip=true"
    )
    assert [s.t for s in states] == pytest.approx([0.5, 0.45, 0.4, 0.35])


@every_sampler
def test_clip_removes_infinity_but_not_nan(name: str) -> None:
    sampler, start = MAKERS[name](10, clip=True), normal(3, 4)
    result = sampler(Broken(Linear(), 1.0, math.inf, -math.inf), start)
    assert result[-1].tolist() == pytest.approx([1, -1, 1, -1])
    with pytest.raises(SamplingError, match=r"after step 1 of 10 \(from t=1 to 0\.9\)"):
        sampler(Broken(Linear(), 1.0, math.nan, 0.0), start)


def test_non_finite_start_or_adjusted_state_is_an_error() -> None:
    denoiser, start = GaussianDenoiser(Linear()), normal(3, 4)

    def adjust(state: State, x_s: Tensor) -> Tensor:
        return x_s / 0 if state.t < 0.3 else x_s

    with pytest.raises(SamplingError, match=r"^DDIM: .* step 4 of 4 \(from t=0\.25 to 0\)\."):
        DDIM(4)(denoiser, start, adjust=adjust)
    with pytest.raises(SamplingError, match=r"^Ancestral: .* step 1 of 4"):
        Ancestral(4)(denoiser, start / 0)


def test_large_finite_states_are_no_error() -> None:
    """The sum of the values is much larger than each value."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        start = torch.full((2, 3, 256, 256), 100.0, dtype=dtype)
        assert bool(DDIM(2)(Broken(VE(), 0.0), start, t_start=0.9).isfinite().all())


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_under_sub_vp_is_an_error(variance: str) -> None:
    """The error is raised before the denoiser is called."""
    with pytest.raises(ValueError, match=r"the sub-VP SDE has none. Use euler_maru"):
        Ancestral(3, variance)(NotCalled(SubVP()), normal(2, 4))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Ancestral(0), "steps=0 .* an integer >= 1$"),
        (lambda: EulerMaruyama(-3), "steps=-3"),
        (lambda: DDIM(0), "steps=0"),
        (lambda: Ancestral(variance="big"), "variance=big .* one of small, large, learned$"),
        (lambda: DDIM(eta=1.1), r"eta=1.1 .* a number in \[0, 1\]$"),
        (lambda: DDIM(eta=-0.1), "eta=-0.1"),
        (lambda: DDIM(eta=float("nan")), "eta=nan"),
        (lambda: DPMSolver(order=3), "order=3 .* one of 1, 2$"),
        (lambda: Heun(churn=-1.0), "churn=-1.0 .* a number >= 0$"),
        (lambda: Heun(churn_min=2.0, churn_max=1.0), "churn_min=2.0 .* above churn_max=1.0"),
        (lambda: PredictorCorrector(snr=0.0), "snr=0.0 .* a number > 0$"),
        (lambda: AnnealedLangevin(langevin_steps=0), "langevin_steps=0 .* an integer >= 1$"),
        (lambda: Karras(0.5), "rho=0.5 .* a number >= 1$"),
        (lambda: ProbabilityFlow(rtol=0.0), "rtol=0.0 .* a number > 0$"),
    ],
)
def test_invalid_settings_are_an_error(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("name", ["steps", "clip", "grid"])
def test_unused_arguments_of_a_predictor_are_an_error(name: str) -> None:
    value = {"steps": 5, "clip": True, "grid": Quadratic()}[name]
    with pytest.raises(ValueError, match=f"predictor.{name} is not used; set {name} of"):
        PredictorCorrector(10, partial(DDIM, **{name: value}))
    assert PredictorCorrector(10, partial(DDIM, eta=0.5)).predictor.eta == 0.5


def test_multistep_predictor_is_an_error() -> None:
    for make in (DPMSolver, UniPC):
        with pytest.raises(ValueError, match="is a multistep method; choose a one-step one"):
            PredictorCorrector(10, make)
    assert PredictorCorrector(10, partial(DPMSolver, order=1)).predictor.order == 1


def test_grid_of_an_adaptive_solver_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"grid=Karras is not used.* set adaptive=false"):
        ProbabilityFlow(grid=Karras())
    assert isinstance(ProbabilityFlow(adaptive=False, grid=Karras()).grid, Karras)
