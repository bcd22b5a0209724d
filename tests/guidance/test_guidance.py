"""Posterior methods on a Gaussian prior: exact moments against the closed-form posterior."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian import COVARIANCE, MEAN, GaussianDenoiser, guidance_moments
from torch import Tensor

from diffusion_lab.guidance import (
    DAPS,
    DDNM,
    DDRM,
    DPS,
    ILVR,
    MMSE,
    TDS,
    DiffPIR,
    Observation,
    REDDiff,
    Residual,
    TruncatedReverseSDE,
)
from diffusion_lab.operator import Matrix
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Heun,
    ProbabilityFlow,
    State,
    UniPC,
)
from diffusion_lab.sampler.time_grid import LogSNR
from diffusion_lab.schedule import EDM, VE, VP, Cosine, Flow, Linear, Schedule, Sigmoid, SubVP

SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "sigmoid": Sigmoid(),
    "vp": VP(),
    "subvp": SubVP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
Y = torch.tensor([0.9, -0.2, -0.8, 0.4], dtype=torch.float64)
SIGMA_Y = 0.5


def posterior(y: Tensor, sigma_y: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 given y = x_0 + σ_y n, computed from precision matrices."""
    precision = torch.linalg.inv(COVARIANCE)
    identity = torch.eye(len(y), dtype=torch.float64)
    covariance = torch.linalg.inv(precision + identity / sigma_y**2)
    return covariance @ (precision @ MEAN + y / sigma_y**2), covariance


def keyed(count: int, seed: int = 0) -> KeyedGenerator:
    return KeyedGenerator(make_key(seed, "test", torch.arange(count)))


def batch(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, dtype=torch.float64, generator=generator)


# --- truncated reverse SDE ----------------------------------------------------------------------


def errors(steps: int, schedule: Schedule, sigma_y: float = SIGMA_Y) -> tuple[float, float]:
    """Error of the mean in posterior standard deviations, and relative error of the covariance."""
    mean, covariance = guidance_moments(
        TruncatedReverseSDE(), EulerMaruyama(steps), GaussianDenoiser(schedule), Y, sigma_y
    )
    mu, expected = posterior(Y, sigma_y)
    shift = torch.linalg.solve(torch.linalg.cholesky(expected), mean - mu)
    return float(shift.norm()), float((covariance - expected).norm() / expected.norm())


@every_schedule
@pytest.mark.parametrize("sigma_y", [0.2, 0.5, 2.0])
def test_truncated_samples_the_posterior(schedule: Schedule, sigma_y: float) -> None:
    """With 64 steps the covariance is within 10%; the error is of first order in the step size."""
    coarse, middle, fine = (errors(steps, schedule, sigma_y) for steps in (16, 64, 256))
    assert middle[0] < 0.05 and middle[1] < 0.1
    if type(schedule) in (VE, EDM):  # without drift, the mean is exact
        assert coarse[0] < 1e-9 and middle[0] < 1e-9 and fine[0] < 1e-9
    for k in (1,) if type(schedule) in (VE, EDM) else (0, 1):
        assert fine[k] < middle[k] / 3 and middle[k] < coarse[k] / 2.5


def test_truncated_covariance_is_that_of_the_posterior_not_the_prior() -> None:
    _, covariance = guidance_moments(
        TruncatedReverseSDE(), EulerMaruyama(64), GaussianDenoiser(Linear()), Y, SIGMA_Y
    )
    assert float(covariance.trace()) < 0.6 * float(COVARIANCE.trace())
    # The discretization error is positive.
    assert float(covariance.trace()) > float(posterior(Y, SIGMA_Y)[1].trace())


@every_schedule
def test_truncated_starts_from_the_observation_at_its_noise_level(schedule: Schedule) -> None:
    y, states = batch(3), []
    result = TruncatedReverseSDE()(
        GaussianDenoiser(schedule),
        EulerMaruyama(5),
        Observation(y, SIGMA_Y),
        generator=keyed(3),
        callback=states.append,
    )
    first: State = states[0]
    assert len(states) == 6 and states[-1].t == 0
    assert float(schedule.ratio(torch.tensor(first.t).double())) == pytest.approx(SIGMA_Y, 1e-6)
    if schedule.variance_preserving:
        alpha_t = (1 + SIGMA_Y**2) ** -0.5  # α² + σ² = 1
    else:
        alpha_t = {VE: 1, EDM: 1, Flow: 1 / (1 + (1 - 1e-5) * SIGMA_Y),
                   SubVP: (1 + SIGMA_Y**2 / 4) ** 0.5 - SIGMA_Y / 2}[type(schedule)]  # fmt: skip
    torch.testing.assert_close(first.x_t, alpha_t * y, rtol=1e-9, atol=1e-9)
    assert torch.equal(states[-1].x_t, result)


def test_methods_that_return_a_noisy_image_warn(caplog) -> None:
    """DPS and ILVR return y itself for A = I, but not for other operators."""
    prior, y = GaussianDenoiser(VP()), Y.repeat(3, 1)
    mask = Matrix(torch.eye(4, dtype=torch.float64)[:2])
    for method in (DPS(), ILVR()):
        name = type(method).__name__
        caplog.clear()
        x_0 = method(prior, Ancestral(100), Observation(y, 0.5))
        assert float((x_0 - y).abs().max()) < 0.5
        assert [r.getMessage().split(":")[0] for r in caplog.records] == [
            f"{name} is not for a noisy image"
        ]
        caplog.clear()
        method(prior, Ancestral(5), Observation(y[:, :2], 0.5, mask))
        assert not caplog.records


def test_truncated_with_deterministic_sampler_gives_one_point_and_warns(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        denoiser = GaussianDenoiser(Linear())
        mean, covariance = guidance_moments(TruncatedReverseSDE(), DDIM(64), denoiser, Y, SIGMA_Y)
    assert float(covariance.abs().max()) == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "DDIM" in warnings[0] and "not a posterior" in warnings[0]
    # The reverse ODE maps quantiles of p(y) to the same quantiles of p(x_0).
    values, axes = torch.linalg.eigh(COVARIANCE)
    expected = MEAN + axes @ ((values / (values + SIGMA_Y**2)).sqrt() * (axes.T @ (Y - MEAN)))
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.01)
    assert float((mean - posterior(Y, SIGMA_Y)[0]).norm()) > 0.1  # not the posterior mean


@pytest.mark.parametrize("sampler", [EulerMaruyama(4), Ancestral(4), DDIM(4, eta=0.5)])
def test_truncated_does_not_warn_with_stochastic_samplers(sampler, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        TruncatedReverseSDE()(GaussianDenoiser(Linear()), sampler, Observation(batch(2), SIGMA_Y))
    assert not caplog.records


# --- posterior mean -----------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("sigma_y", [0.05, 0.5, 3.0])
def test_mmse_equals_the_posterior_mean(schedule: Schedule, sigma_y: float) -> None:
    y, states = batch(5), []
    estimate = MMSE()(
        GaussianDenoiser(schedule), DDIM(1), Observation(y, sigma_y), callback=states.append
    )
    expected = torch.stack([posterior(row, sigma_y)[0] for row in y])
    torch.testing.assert_close(estimate, expected, rtol=1e-9, atol=1e-9)
    assert [s.t == 0 for s in states] == [False, True] and torch.equal(states[1].x_t, estimate)


def test_stochastic_attribute_of_methods() -> None:
    assert not MMSE.stochastic and TruncatedReverseSDE.stochastic and Residual.stochastic


# --- residual method ----------------------------------------------------------------------------

T = 20
BETA = np.linspace(1e-4, 0.3, T)
SHORT = Linear(beta_max=0.3, steps=T)


def epsilon_hat(x: np.ndarray, alpha_bar: float) -> np.ndarray:
    """-√(1 - ᾱ) ∇ log p(x_t), for x_t ~ N(√ᾱ m, ᾱ C + (1 - ᾱ) I)."""
    covariance = alpha_bar * COVARIANCE.numpy() + (1 - alpha_bar) * np.eye(4)
    difference = x - alpha_bar**0.5 * MEAN.numpy()
    return (1 - alpha_bar) ** 0.5 * np.linalg.solve(covariance, difference.T).T


def written_rule(
    x: np.ndarray, y: np.ndarray, z: list[np.ndarray], strength: float, variance: str
) -> np.ndarray:
    """x_{t-1} = 1/√a_t (x_t - β_t/√(1 - ᾱ_t) ε̂) + s_t z + λ (y - x_t), from index len(z) - 1."""
    alpha_bar = np.cumprod(1 - BETA)
    for i in reversed(range(len(z))):
        s_t = 0.0  # no noise in the last step
        if i > 0:
            tilde = BETA[i] * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i])
            s_t = (tilde if variance == "small" else BETA[i]) ** 0.5
        drift = x - BETA[i] / (1 - alpha_bar[i]) ** 0.5 * epsilon_hat(x, alpha_bar[i])
        x = drift / (1 - BETA[i]) ** 0.5 + s_t * z[len(z) - 1 - i] + strength * (y - x)
    return x


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.4])
def test_residual_from_noise_matches_its_formula(variance: str, strength: float) -> None:
    y, draws = batch(3), keyed(3)
    x_t, *z = (draws.normal(4, dtype=torch.float64).numpy() for _ in range(T + 1))
    expected = torch.from_numpy(written_rule(x_t, y.numpy(), z, strength, variance))
    actual = Residual(strength)(
        GaussianDenoiser(SHORT),
        Ancestral(T, variance),
        Observation(y, SIGMA_Y),
        generator=keyed(3),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.4])
def test_residual_from_y_matches_its_formula(variance: str, strength: float) -> None:
    """The noise level of y is at index 11, so that its 12 steps are the last 12 of the formula."""
    y, draws, alpha_bar = batch(3), keyed(3), np.cumprod(1 - BETA)[11]
    z = [draws.normal(4, dtype=torch.float64).numpy() for _ in range(12)]
    x_t = alpha_bar**0.5 * y.numpy()
    expected = torch.from_numpy(written_rule(x_t, y.numpy(), z, strength, variance))
    actual = Residual(strength, start="y")(
        GaussianDenoiser(SHORT),
        Ancestral(12, variance),
        Observation(y, float((1 / alpha_bar - 1) ** 0.5)),
        generator=keyed(3),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_residual_with_zero_gain_equals_unconditional_sampling(variance: str) -> None:
    sampler, denoiser, generator = Ancestral(T, variance), GaussianDenoiser(SHORT), keyed(4)
    start = generator.normal(4, dtype=torch.float64)
    expected = sampler(denoiser, start, generator=generator)
    observation = Observation(batch(4), SIGMA_Y)
    actual = Residual(0.0)(denoiser, sampler, observation, generator=keyed(4))
    assert torch.equal(actual, expected)
    pulled = Residual(0.1)(denoiser, sampler, observation, generator=keyed(4))
    assert float((pulled - expected).abs().min()) > 1e-3


@pytest.mark.parametrize("sampler", [DDIM(5), DDIM(5, eta=0.5), EulerMaruyama(5)])
def test_residual_adds_its_term_to_every_sampler_and_schedule(sampler) -> None:
    """It starts from s n, with s the standard deviation at t = 1.

    Each step is the step of the sampler plus λ (y - x_t).
    """
    y = batch(3)
    for schedule, std in ((Linear(), 1.0), (VE(), 348.0), (EDM(), 80.0), (Flow(), 1.0)):
        denoiser, draws = GaussianDenoiser(schedule), keyed(3)
        x_t = std * draws.normal(4, dtype=torch.float64)
        times = sampler.times(schedule)
        states, expected = [], [x_t]
        for t, s in pairwise(times):
            state = State(float(t), x_t, denoiser(x_t, t))
            x_s = sampler.step(
                denoiser, state, s, lambda x, draws=draws: draws.normal(4, dtype=x.dtype)
            )
            x_t = x_s + 0.05 * (y - x_t)
            expected.append(x_t)
        actual = Residual(0.05)(
            denoiser, sampler, Observation(y, SIGMA_Y), generator=keyed(3), callback=states.append
        )
        assert [s.t for s in states] == times.tolist()
        for state, x in zip(states, expected, strict=True):
            torch.testing.assert_close(state.x_t, x, rtol=1e-6, atol=1e-6)
        assert torch.equal(states[-1].x_t, actual)


def test_residual_with_an_incompatible_solver_is_an_error() -> None:
    denoiser, observation = GaussianDenoiser(Linear()), Observation(batch(2), SIGMA_Y)
    for sampler in (ProbabilityFlow(), UniPC()):
        with pytest.raises(
            ValueError, match=r"(would undo|overwrites) what this method changes after every"
        ):
            Residual()(denoiser, sampler, observation)
    fixed = ProbabilityFlow(8, adaptive=False)
    free, pulled = (
        Residual(strength)(denoiser, fixed, observation, generator=keyed(2))
        for strength in (0.0, 0.3)
    )
    assert float((pulled - free).abs().min()) > 1e-3


def test_residual_output_requires_no_grad() -> None:
    observation = Observation(batch(2).requires_grad_(), SIGMA_Y)
    for start in ("noise", "y"):
        result = Residual(start=start)(GaussianDenoiser(Linear()), Ancestral(2), observation)
        assert not result.requires_grad


def test_residual_clips_the_estimate_if_the_sampler_does() -> None:
    """With λ = 0 it equals the sampler; the last step returns x̂, which is clipped."""
    denoiser = GaussianDenoiser(SHORT, 3 * MEAN, COVARIANCE)
    observation = Observation(batch(6), SIGMA_Y)
    plain = Residual(0.0)(denoiser, Ancestral(T), observation, generator=keyed(6))
    assert float(plain.abs().max()) > 1.5
    sampler, generator = Ancestral(T, clip=True), keyed(6)
    start = generator.normal(4, dtype=torch.float64)
    expected = sampler(denoiser, start, generator=generator)
    clipped = Residual(0.0)(denoiser, sampler, observation, generator=keyed(6))
    assert torch.equal(clipped, expected)
    assert float(clipped.abs().max()) <= 1 + 1e-6


def test_residual_variance_decreases_with_the_gain_and_is_not_exact() -> None:
    """As documented, the variance is too large for a small λ and too small for a large one."""
    widths = [
        float(
            guidance_moments(
                Residual(strength), Ancestral(1000), GaussianDenoiser(Linear()), Y, SIGMA_Y
            )[1].trace()
        )
        for strength in (0.001, 0.2)
    ]
    exact = float(posterior(Y, SIGMA_Y)[1].trace())
    assert widths[0] > 1.3 * exact and widths[1] < 0.5 * exact


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"gain": -0.1}, "gain=-0.1 .*>= 0"),
        ({"gain": float("nan")}, "gain=nan"),
        ({"start": "x"}, "start=x .*one of noise, y"),
    ],
)
def test_invalid_settings_are_an_error(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Residual(**arguments)


@pytest.mark.parametrize("guidance", [TruncatedReverseSDE(), MMSE(), Residual(start="y")])
def test_sigma_y_outside_the_schedule_is_an_error(guidance) -> None:
    with pytest.raises(ValueError, match="outside the schedule Linear"):
        guidance(GaussianDenoiser(SHORT), Ancestral(1), Observation(batch(2), 1000.0))


@pytest.mark.parametrize(
    "guidance", [TruncatedReverseSDE(), MMSE(), Residual(), Residual(start="y")]
)
def test_samples_do_not_depend_on_the_batch(guidance) -> None:
    y = batch(5)

    def run(chosen: list[int]) -> Tensor:
        generator = KeyedGenerator(make_key(1, torch.tensor(chosen)))
        observation = Observation(y[chosen], SIGMA_Y)
        sampler = EulerMaruyama(1 if isinstance(guidance, MMSE) else 8)
        return guidance(GaussianDenoiser(SHORT), sampler, observation, generator=generator)

    whole = run([0, 1, 2, 3, 4])
    torch.testing.assert_close(run([3, 1]), whole[[3, 1]], rtol=1e-12, atol=1e-12)


# --- sampler arguments --------------------------------------------------------------------------

OWN_STEPS = [DAPS(), DDNM(), DDRM(), DiffPIR(), REDDiff(), TDS()]


@pytest.mark.parametrize("guidance", OWN_STEPS, ids=lambda g: type(g).__name__)
@pytest.mark.parametrize(
    ("sampler", "named"),
    [
        (DDIM(3, eta=0.5), "sampler.eta=0.5"),
        (Ancestral(3, variance="large"), "sampler.variance=large"),
        (Heun(3, churn=1.0), "sampler.churn=1.0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unused_sampler_arguments_are_an_error(guidance, sampler, named) -> None:
    name = type(guidance).__name__
    with pytest.raises(ValueError, match=f"{named} is not used by {name}, .* remove it"):
        guidance(GaussianDenoiser(Linear()), sampler, Observation(batch(2), SIGMA_Y))
    guidance.check_sampler(type(sampler)(3, grid=LogSNR(), clip=True))


def test_error_names_the_guidance_argument_of_the_same_name() -> None:
    with pytest.raises(ValueError, match=r"remove it; DDRM has its own guidance.eta"):
        DDRM().check_sampler(DDIM(3, eta=0.5))


def test_methods_that_use_the_sampler_step_accept_any_sampler() -> None:
    for guidance in (TruncatedReverseSDE(), Residual()):
        guidance.check_sampler(DDIM(3, eta=0.5))


def test_mmse_accepts_only_one_step() -> None:
    observation = Observation(3 * batch(2), SIGMA_Y)
    with pytest.raises(ValueError, match=r"sampler.steps=2 is not used by MMSE.*sampler.steps=1"):
        MMSE()(GaussianDenoiser(Linear()), DDIM(2), observation)
    free, clipped = (
        MMSE()(GaussianDenoiser(Linear()), DDIM(1, clip=clip), observation)
        for clip in (False, True)
    )
    assert torch.equal(clipped, free.clamp(-1, 1)) and float(free.abs().max()) > 1
