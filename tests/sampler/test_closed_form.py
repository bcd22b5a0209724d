"""Every sampler against a Gaussian mixture whose denoiser is exact, in float64.

The distance is measured in whitened coordinates, relative to that of exact samples. A plain
distance between samples of a mixture depends mostly on the random component counts, so that wrong
samplers pass.
"""

import math
from collections.abc import Callable
from functools import cache

import mixture_distance
import numpy as np
import pytest
import torch
from problems import COUNT, MIXTURE, SCHEDULES, D, start
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Rescheduled
from diffusion_lab.errors import SamplingError
from diffusion_lab.sampler import (
    DDIM,
    SEEDS,
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
)  # fmt: skip
from diffusion_lab.sampler.time_grid import Karras, LogSNR, Quadratic, Uniform
from diffusion_lab.schedule import EDM, VE, Flow, Laplace, Linear, Schedule, SubVP
from diffusion_lab.transition import transition

FLOOR = mixture_distance.floor(MIXTURE, COUNT, seed=0)

ROWS: dict[str, tuple[Sampler, float]] = {  # the maximum distance, in multiples of the floor
    "ancestral 500": (Ancestral(500, grid=LogSNR()), 1.5),
    "ancestral 500 uniform": (Ancestral(500), 2.4),
    "ddim 200": (DDIM(200, grid=LogSNR()), 1.5),
    "ddim 200 uniform": (DDIM(200), 2.4),
    "euler_maruyama 500 uniform": (EulerMaruyama(500), 1.4),
    "heun 50": (Heun(50), 1.35),
    "dpm_solver 50": (DPMSolver(50), 1.35),
    "unipc 50": (UniPC(50), 1.35),
    "probability_flow": (ProbabilityFlow(), 1.35),
    "seeds 50": (SEEDS(50), 1.35),
    "sde dpm_solver 100": (DPMSolver(100, stochastic=True), 1.35),
    "predictor_corrector 250": (PredictorCorrector(250), 1.4),
}
# Tested once under one schedule: they share code with a row above, or are slow.
OTHERS: dict[str, tuple[Sampler, Schedule, float]] = {
    "reverse_diffusion": (ReverseDiffusion(500), SCHEDULES["vp"], 1.4),
    "dormand-prince on a grid": (ProbabilityFlow(20, adaptive=False), SCHEDULES["linear"], 1.35),
    "heun karras": (Heun(50, grid=Karras()), SCHEDULES["ve"], 1.35),
    "heun churn": (Heun(50, churn=20.0), SCHEDULES["ve"], 1.35),
    "heun quadratic": (Heun(100, grid=Quadratic()), SCHEDULES["vp"], 1.6),
    "ddim eta 1": (DDIM(500, eta=1.0, grid=LogSNR()), SCHEDULES["linear"], 1.5),
    "sub-vp euler_maruyama": (EulerMaruyama(500), SubVP(), 1.4),
    "sub-vp unipc": (UniPC(50), SubVP(), 1.35),
    "edm heun": (Heun(50), EDM(), 1.35),
    "flow dpm_solver": (DPMSolver(50), Flow(), 1.35),
    "flow euler_maruyama": (EulerMaruyama(500), Flow(), 1.4),
    "zero terminal snr": (Heun(50), Linear(zero_terminal_snr=True), 1.35),
    # With b = 0.5 the noise level at t_min is visible.
    "laplace": (DPMSolver(50), Laplace(b=2.0), 1.35),
    "shifted": (DPMSolver(50), Linear(shift=4.0), 1.35),
    "ancestral large": (Ancestral(1000, variance="large"), SCHEDULES["linear"], 2.4),
}


def graded(sampler: Sampler, schedule: Schedule, denoiser: Denoiser | None = None) -> tuple:
    x, generator = start(schedule)
    samples = sampler(denoiser or MIXTURE.denoiser(schedule), x, generator=generator)
    distance, shares = mixture_distance.distance(MIXTURE, samples)
    return distance / FLOOR, shares


# The other schedules differ from this one only in their numbers.
IN_MINUTES = [
    pytest.param(name, marks=() if name == "linear" else pytest.mark.slow) for name in SCHEDULES
]
# These take hundreds of steps.
LONG = [
    "ancestral 500 uniform", "ancestral large", "ddim eta 1", "flow euler_maruyama",
    "predictor_corrector 250", "sub-vp euler_maruyama",
]  # fmt: skip


@pytest.mark.parametrize("schedule", IN_MINUTES)
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow if row in LONG else ()) for row in ROWS],
)
def test_samplers_converge_to_the_mixture(row: str, schedule: str) -> None:
    sampler, bound = ROWS[row]
    ratio, shares = graded(sampler, SCHEDULES[schedule])
    assert ratio <= bound and shares <= 0.03, (ratio, shares)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow if row in LONG else ()) for row in OTHERS],
)
def test_other_samplers_and_schedules_converge_to_the_mixture(row: str) -> None:
    sampler, schedule, bound = OTHERS[row]
    ratio, shares = graded(sampler, schedule)
    assert ratio <= bound and shares <= 0.03, (ratio, shares)


# --- planted bugs are detected ------------------------------------------------------------------


class LevelOff(DDIM):
    """A bug: each step goes to the level after the requested one."""

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Callable) -> Tensor:
        times = self.times(denoiser.schedule)
        k = min(int((times >= s).sum()), len(times) - 2)  # one level below s
        return super().step(denoiser, state, times[k] if s > 0 else s, noise)


class WrongSign(DPMSolver):
    """A bug: extrapolates in the wrong direction."""

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Callable) -> Tensor:
        if state.previous is not None:
            other = 2 * state.denoised - state.previous.denoised
            state = State(state.t, state.x_t, state.denoised,
                          State(state.previous.t, state.previous.x_t, other))  # fmt: skip
        return super().step(denoiser, state, s, noise)


class TooLittleNoise(EulerMaruyama):
    """A bug: √(g² dt / 2), with a missing factor √2."""

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Callable) -> Tensor:
        return super().step(denoiser, state, s, lambda x: noise(x) / math.sqrt(2))


class NotAlphaBar(DDIM):
    """A bug: ε̂ computed with α_s in place of α_t."""

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Callable) -> Tensor:
        step = transition(denoiser.schedule, state.t, s)
        epsilon = (state.x_t - step.alpha_s * state.denoised) / step.sigma_t
        return step.alpha_s * state.denoised + step.sigma_s * epsilon


BUGS = {
    "a level off": (LevelOff(200, grid=LogSNR()), 1.5),
    "wrong sign in 2M": (WrongSign(50), 1.35),
    "2M of first order": (DPMSolver(50, order=1), 1.35),
    "too little noise": (TooLittleNoise(500), 1.4),
    "α of the wrong level": (NotAlphaBar(200, grid=LogSNR()), 1.5),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_exceed_the_maximum_distance(bug: str) -> None:
    """A plain distance would not detect the first three."""
    sampler, bound = BUGS[bug]
    ratio, _ = graded(sampler, SCHEDULES["linear"])
    assert ratio > 1.15 * bound, ratio


# --- order of convergence -----------------------------------------------------------------------


@cache
def solved(schedule: str) -> tuple[Denoiser, Tensor, Tensor]:
    denoiser = MIXTURE.denoiser(SCHEDULES[schedule])
    x, _ = start(denoiser.schedule, 128)
    return denoiser, x, ProbabilityFlow(5000, rtol=1e-10, atol=1e-10)(denoiser, x)


@pytest.mark.parametrize("schedule", IN_MINUTES)
@pytest.mark.parametrize(
    "make, order, tolerance",
    [
        (lambda n: DDIM(n, grid=LogSNR()), 1, 0.15),
        (Heun, 2, 0.15),
        (DPMSolver, 2, 0.15),
        (UniPC, 3, 0.15),
    ],
    ids=["ddim", "heun", "dpm_solver", "unipc"],
)
def test_order_of_convergence(make: Callable, order: int, tolerance: float, schedule: str) -> None:
    """The slope of the median error over N, for equal initial states. UniC-2 has order 3."""
    denoiser, x, exact = solved(schedule)
    steps = np.array([100, 150, 225])
    errors = [float((make(int(n))(denoiser, x) - exact).norm(dim=1).median()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=tolerance)


# --- any prior under any schedule ---------------------------------------------------------------


@pytest.mark.parametrize("own, other", [("linear", "ve"), ("ve", "linear"), ("cosine", "vp")])
def test_rescheduled_denoiser_matches_the_denoiser_of_the_other_schedule(
    own: str, other: str
) -> None:
    """This holds at noise levels that both schedules have."""
    wide = VE(sigma_min=0.01, sigma_max=150.0) if other == "ve" else SCHEDULES[other]
    narrow = SCHEDULES[own]
    rescheduled = Rescheduled(MIXTURE.denoiser(narrow), wide)
    top = float(min(narrow.ratio(1.0), wide.ratio(1.0)))
    for ratio in (0.02, 0.3, 2.0, 0.999 * top):
        t = wide.t_from_ratio(ratio)
        x_t = start(wide, 16)[0] * wide(t)[1] + wide(t)[0] * MIXTURE.means[0]
        torch.testing.assert_close(
            rescheduled(x_t, t), MIXTURE.denoiser(wide)(x_t, t), rtol=1e-8, atol=1e-8
        )


def test_unipc_with_a_rescheduled_denoiser_converges_to_the_mixture() -> None:
    """A VE sampler uses a prior of DDPM's linear schedule, within the levels of the latter."""
    schedule = VE(sigma_min=0.02, sigma_max=150.0)
    denoiser = Rescheduled(MIXTURE.denoiser(SCHEDULES["linear"]), schedule)
    ratio, shares = graded(UniPC(50), schedule, denoiser)
    assert ratio <= 1.35 and shares <= 0.03
    denoiser = Rescheduled(MIXTURE.denoiser(SCHEDULES["ve"]), SCHEDULES["linear"])
    ratio, shares = graded(UniPC(50), SCHEDULES["linear"], denoiser)
    assert ratio <= 1.35 and shares <= 0.03


def test_level_outside_the_schedule_of_the_prior_is_an_error() -> None:
    denoiser = Rescheduled(MIXTURE.denoiser(SCHEDULES["linear"]), VE())
    with pytest.raises(ValueError, match="= 348 is outside the schedule Linear, whose range"):
        DDIM(10)(denoiser, start(VE(), 2)[0])


# --- other tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_transitions_compose_to_the_marginal(name: str) -> None:
    """The composition of all q(x_i | x_{i-1}) has the factor α_t and the variance σ_t²."""
    schedule = SCHEDULES[name]
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for s, t in zip(range(1000), range(1, 1001), strict=True):
        step = transition(schedule, t / 1000, s / 1000)
        factor = step.alpha_t / step.alpha_s
        mean, variance = factor * mean, factor**2 * variance + step.variance
    alpha_1, sigma_1 = schedule(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(mean, alpha_1, rtol=1e-9, atol=0)
    torch.testing.assert_close(variance.sqrt(), sigma_1, rtol=1e-9, atol=0)


def test_ancestral_sampling_of_the_sub_vp_sde_is_an_error() -> None:
    denoiser = MIXTURE.denoiser(SubVP())
    for sampler in (Ancestral(10), PredictorCorrector(10, Ancestral)):
        with pytest.raises(ValueError, match="the sub-VP SDE has none"):
            sampler(denoiser, torch.zeros(2, D, dtype=torch.float64))


def test_langevin_steps_preserve_the_distribution() -> None:
    """With small steps, many corrections do not change the distribution at a level."""
    ratio, shares = graded(PredictorCorrector(100, langevin_steps=4, snr=0.05), SCHEDULES["vp"])
    assert ratio <= 1.8 and shares <= 0.03


def test_annealed_langevin_improves_with_the_steps_per_level() -> None:
    """Too few steps keep noise of the previous levels. The component weights are not compared."""
    errors = []
    for count in (2, 5, 20):
        x, generator = start(SCHEDULES["ve"], 512)
        sampler = AnnealedLangevin(100, count, 0.2)
        samples = sampler(MIXTURE.denoiser(SCHEDULES["ve"]), x, generator=generator)
        z, k = MIXTURE.whitened(samples)
        errors.append(float(z.std()) - 1)
        assert len(k.unique()) == 3
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0 and errors[2] < 0.05, errors


def test_non_finite_state_stops_the_sampler() -> None:
    class Broken(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return x_t * (math.nan if bool((t < 0.55).any()) else 1)

    start = torch.ones(2, D, dtype=torch.float64)
    with pytest.raises(SamplingError, match=r"DDIM: .* after step 6 of 10 \(from t=0.5 to 0.4\)"):
        DDIM(10)(Broken(Linear()), start)
    with pytest.raises(SamplingError, match=r"ProbabilityFlow reached σ/α = .* after 50 steps"):
        ProbabilityFlow(50)(Broken(Linear()), start)


@pytest.mark.parametrize("grid", [Uniform(), Quadratic(), LogSNR(), Karras()])
@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), EDM(), Flow(), SubVP()])
@pytest.mark.parametrize("t_start", [1.0, 0.3, 1e-4])
def test_time_grids_decrease_from_the_start_to_zero(
    grid, schedule: Schedule, t_start: float
) -> None:
    for steps in (1, 2, 17):
        times = grid(schedule, steps, t_start)
        assert times.shape == (steps + 1,) and times.dtype == torch.float64
        assert float(times[0]) == t_start and float(times[-1]) == 0
        assert bool((times.diff() < 0).all())


def test_time_grids_match_their_formulas() -> None:
    ve = SCHEDULES["ve"]
    ratio = ve.ratio(LogSNR()(ve, 11, 1.0)[:-1])
    torch.testing.assert_close(
        ratio, torch.logspace(math.log10(float(ratio[0])), -2, 11, dtype=torch.float64)
    )
    i = torch.arange(18, dtype=torch.float64) / 17  # the grid of EDM with its levels
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    edm = EDM()
    torch.testing.assert_close(edm.ratio(Karras(7.0)(edm, 18, 1.0)[:-1]), expected)
    expected = 0.8 * (1 - torch.arange(6, dtype=torch.float64) / 5) ** 2
    torch.testing.assert_close(Quadratic()(ve, 5, 0.8), expected)
