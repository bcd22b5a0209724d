"""Methods without the network's Jacobian, against the formulas of their papers and exact results.

The formulas are written in NumPy for a matrix with singular values above and below the ratio of
y's noise to the state's noise, and one direction that y does not depend on. The noise is drawn as
in the method, in the same order.
"""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian import COVARIANCE, MEAN, BasisNoise, GaussianDenoiser, moments
from torch import Tensor

from diffusion_lab.analytic import Gaussian
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.guidance import (
    DAPS,
    DDNM,
    DDRM,
    ILVR,
    DiffPIR,
    Guidance,
    Observation,
    PnPDM,
    REDDiff,
    Replacement,
    TruncatedReverseSDE,
)
from diffusion_lab.guidance.base import CustomStep
from diffusion_lab.guidance.reddiff import red_gradient
from diffusion_lab.guidance.time_travel import TimeTravelSampler
from diffusion_lab.operator import (
    AveragePool,
    BoxInpainting,
    GaussianBlur,
    Grayscale,
    Identity,
    Matrix,
    MotionBlur,
    Operator,
)
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import (
    DDIM,
    Ancestral,
    DPMSolver,
    EulerMaruyama,
    ProbabilityFlow,
    Sampler,
    State,
    UniPC,
)
from diffusion_lab.sampler.time_grid import LogSNR, TimeGrid
from diffusion_lab.schedule import EDM, VE, VP, Linear, Schedule

D = 4
U, _, VT = np.linalg.svd(np.cos(np.arange(12.0).reshape(3, 4)))
S = np.array([1.5, 0.6, 0.05])
A = U @ np.diag(S) @ VT[:3]
PINV = np.linalg.pinv(A)
MATRIX = Matrix(torch.from_numpy(A))
SCHEDULES = {"linear": Linear(), "vp": VP(), "ve": VE(), "edm": EDM()}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
with_and_without_noise = pytest.mark.parametrize("sigma_y", [0.0, 0.3])
N = 8

# Every method once, with few network calls each.
METHODS = {
    "replacement": Replacement(),
    "repaint": Replacement(repeats=3, jump=2),
    "ilvr": ILVR(),
    "ddrm": DDRM(),
    "ddnm": DDNM(),
    "ddnm_travel": DDNM(repeats=2, jump=3),
    "diffpir": DiffPIR(),
    "daps": DAPS(ode_steps=2),
    "pnpdm": PnPDM(iterations=3),
    "reddiff": REDDiff(),
}
every_method = pytest.mark.parametrize("guidance", METHODS.values(), ids=METHODS.keys())


class UnmarkedLinear(Operator):
    """A linear operator that is not marked as linear."""

    def forward(self, x: Tensor) -> Tensor:
        return MATRIX(x)

    def to_image(self, y: Tensor) -> Tensor:
        return y


class Ratios(TimeGrid):
    """A time grid with given noise levels after the first, equal for all schedules."""

    def __init__(self, *ratios: float) -> None:
        self.ratios = torch.tensor([*ratios, 0.0], dtype=torch.float64)

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        times = schedule.t_from_ratio(self.ratios)
        return torch.cat([torch.tensor([t_start], dtype=torch.float64), times])


def keyed(count: int, seed: int = 0) -> KeyedGenerator:
    return KeyedGenerator(make_key(seed, "test", torch.arange(count)))


def draws(count: int) -> Callable[[], np.ndarray]:
    """The noise that a method gets from `keyed`, one draw per call."""
    generator = keyed(count)
    return lambda: generator.normal(D, dtype=torch.float64).numpy()


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def denoised(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x_0 | x_t] for x_0 ~ N(m, C), row by row."""
    m, c = MEAN.numpy(), COVARIANCE.numpy()
    gain = alpha * c @ np.linalg.inv(alpha**2 * c + sigma**2 * np.eye(D))
    return m + (x - alpha * m) @ gain.T


def ladder(sampler: Sampler, schedule: Schedule) -> list[tuple[float, float]]:
    """α_t and σ_t at the sampler's times."""
    return [tuple(float(c) for c in schedule(t)) for t in sampler.times(schedule)]


def run(
    guidance: Guidance, sampler: Sampler, schedule: Schedule, y: Tensor, sigma_y: float,
    operator: Operator = MATRIX, **settings,
) -> Tensor:  # fmt: skip
    observation = Observation(y, sigma_y, operator)
    settings.setdefault("generator", keyed(len(y)))
    return guidance(GaussianDenoiser(schedule), sampler, observation, **settings)


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- single steps and algorithms of the papers --------------------------------------------------


@every_schedule
@with_and_without_noise
@pytest.mark.parametrize("eta, eta_b", [(0.85, 1.0), (0.0, 0.4), (1.0, 0.0)])
def test_ddrm_matches_the_paper(schedule, sigma_y: float, eta: float, eta_b: float) -> None:
    """In the paper's coordinates, x̄ = Vᵀ x_t / α_t has noise r.

    The fourth component has s = 0.
    """
    y, draw = numbers(3, 3), draws(3)
    levels = ladder(DDIM(N), schedule)
    r_1, (alpha_1, _) = levels[0][1] / levels[0][0], levels[0]
    z = draw() @ VT.T
    bar_y = (y.numpy() @ U) / S
    bar = schedule.prior_std / alpha_1 * z
    for i in range(3):
        nu = sigma_y / S[i]
        if r_1 >= nu:
            bar[:, i] = bar_y[:, i] + (r_1**2 - nu**2) ** 0.5 * z[:, i]
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(levels):
        r, r_s = sigma_t / alpha_t, sigma_s / alpha_s
        hat = denoised(alpha_t * bar @ VT, alpha_t, sigma_t) @ VT.T
        z = draw() @ VT.T
        new = hat + (1 - eta**2) ** 0.5 * r_s * (bar - hat) / r + eta * r_s * z  # s = 0
        for i in range(3):
            nu = sigma_y / S[i]
            if r_s < nu:
                pull = (bar_y[:, i] - hat[:, i]) / nu
                new[:, i] = hat[:, i] + (1 - eta**2) ** 0.5 * r_s * pull + eta * r_s * z[:, i]
            else:
                std = (r_s**2 - eta_b**2 * nu**2) ** 0.5
                new[:, i] = (1 - eta_b) * hat[:, i] + eta_b * bar_y[:, i] + std * z[:, i]
        bar = new
    close(run(DDRM(eta, eta_b), DDIM(N), schedule, y, sigma_y), bar @ VT, 1e-7)


@every_schedule
@pytest.mark.parametrize("eta", [0.85, 0.0])
def test_ddnm_without_noise_matches_the_paper(schedule: Schedule, eta: float) -> None:
    y, draw = numbers(3, 3), draws(3)
    x = schedule.prior_std * draw()
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(ladder(DDIM(N), schedule)):
        hat = denoised(x, alpha_t, sigma_t)
        epsilon = (x - alpha_t * hat) / sigma_t
        corrected = hat - (hat @ A.T - y.numpy()) @ PINV.T
        x = alpha_s * corrected + sigma_s * (eta * draw() + (1 - eta**2) ** 0.5 * epsilon)
    close(run(DDNM(eta), DDIM(N), schedule, y, 0.0), x, 1e-7)


@every_schedule
@pytest.mark.parametrize("eta", [0.85, 0.0])
def test_ddnm_with_noise_matches_the_paper(schedule: Schedule, eta: float) -> None:
    """x̂' = x̂ - Σ A⁺ (A x̂ - y), and x_s = α_s x̂' + noise of covariance Φ."""
    sigma_y, y, draw = 0.3, numbers(3, 3), draws(3)
    x = schedule.prior_std * draw()
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(ladder(DDIM(N), schedule)):
        lam, of_z, of_epsilon = np.ones(D), np.zeros(D), np.zeros(D)
        of_z[3], of_epsilon[3] = eta * sigma_s, (1 - eta**2) ** 0.5 * sigma_s
        for i in range(3):
            if sigma_s < alpha_s * sigma_y / S[i]:
                lam[i] = S[i] * sigma_s * (1 - eta**2) ** 0.5 / (alpha_s * sigma_y)
                of_z[i] = eta * sigma_s
            else:
                of_z[i] = (sigma_s**2 - alpha_s**2 * sigma_y**2 / S[i] ** 2) ** 0.5
        hat = denoised(x, alpha_t, sigma_t)
        epsilon = (x - alpha_t * hat) / sigma_t
        corrected = hat - (hat @ A.T - y.numpy()) @ (VT.T @ np.diag(lam) @ VT @ PINV).T
        x = alpha_s * corrected + (draw() @ VT.T * of_z + epsilon @ VT.T * of_epsilon) @ VT
    close(run(DDNM(eta), DDIM(N), schedule, y, sigma_y), x, 1e-7)


@every_schedule
@pytest.mark.parametrize("sigma_y", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("strength, zeta", [(7.0, 0.3), (0.5, 1.0), (1.0, 0.0)])
def test_diffpir_matches_the_paper(schedule, sigma_y: float, strength: float, zeta) -> None:
    y, draw = numbers(3, 3), draws(3)
    x = schedule.prior_std * draw()
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(ladder(DDIM(N), schedule)):
        rho = strength * sigma_y**2 / (sigma_t / alpha_t) ** 2
        hat = denoised(x, alpha_t, sigma_t)
        if sigma_y > 0:  # the minimizer, by the normal equations
            right = y.numpy() @ A + rho * hat
            hat = np.linalg.solve(A.T @ A + rho * np.eye(D), right.T).T
        else:
            hat = hat - (hat @ A.T - y.numpy()) @ PINV.T
        epsilon = (x - alpha_t * hat) / sigma_t
        x = alpha_s * hat + sigma_s * ((1 - zeta) ** 0.5 * epsilon + zeta**0.5 * draw())
    # For a very small ρ, the normal equations of the reference lose about six digits.
    close(run(DiffPIR(strength, zeta), DDIM(N), schedule, y, sigma_y), x, 1e-6)


def ancestral(x: np.ndarray, t: tuple, s: tuple, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """A step of DDPM with the small variance, q(x_s | x_t, x̂)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s), hat = t, s, denoised(x, *t)
    v = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    mean = (alpha_t / alpha_s * sigma_s**2 * x + alpha_s * v * hat) / sigma_t**2
    return mean + (v**0.5 * sigma_s / sigma_t) * draw()


def replaced(x: np.ndarray, y: np.ndarray, s: tuple, sigma_y: float, z: np.ndarray) -> np.ndarray:
    alpha_s, sigma_s = s
    c, z, c_y = x @ VT.T, z @ VT.T, (y @ U) / S
    for i in range(3):
        rest = sigma_s**2 - (alpha_s * sigma_y / S[i]) ** 2
        if rest >= 0:
            c[:, i] = alpha_s * c_y[:, i] + rest**0.5 * z[:, i]
    return c @ VT


@every_schedule
@with_and_without_noise
@pytest.mark.parametrize("repeats", [1, 3])
def test_repaint_matches_algorithm_1(schedule: Schedule, sigma_y: float, repeats: int) -> None:
    """Steps are repeated at the levels at which all coefficients are replaced."""
    y, draw = numbers(3, 3), draws(3)
    x = schedule.prior_std * draw()
    for t, s in pairwise(ladder(Ancestral(N), schedule)):
        passes = repeats if s[0] * sigma_y / S.min() <= s[1] else 1
        for u in range(passes):
            x = ancestral(x, t, s, draw)
            x = replaced(x, y.numpy(), s, sigma_y, draw())
            if s[1] == 0:
                break
            if u < passes - 1:
                a = t[0] / s[0]
                x = a * x + (t[1] ** 2 - (a * s[1]) ** 2) ** 0.5 * draw()
    close(run(Replacement(repeats), Ancestral(N), schedule, y, sigma_y), x, 1e-7)


@every_schedule
@pytest.mark.parametrize("t_stop", [0.0, 0.4])
def test_ilvr_matches_algorithm_1(schedule: Schedule, t_stop: float) -> None:
    y, draw = numbers(3, 3), draws(3)
    x, low = schedule.prior_std * draw(), PINV @ A
    times = Ancestral(N).times(schedule).tolist()
    for k, (t, s) in enumerate(pairwise(ladder(Ancestral(N), schedule))):
        x = ancestral(x, t, s, draw)
        if times[k + 1] >= t_stop:
            reference = s[0] * y.numpy() @ PINV.T + s[1] * draw() @ low.T
            x = reference + x - x @ low.T
    result = run(ILVR(t_stop), Ancestral(N), schedule, y, 0.5)
    close(result, x, 1e-7)
    torch.testing.assert_close(run(ILVR(t_stop), Ancestral(N), schedule, y, 0.0), result)
    assert (t_stop == 0) == bool((MATRIX(result) - y).abs().max() < 1e-9)


@every_schedule
@with_and_without_noise
def test_daps_matches_algorithm_1(schedule: Schedule, sigma_y: float) -> None:
    """The ODE is solved by Euler's method in r on a grid uniform in r^{1/7}."""
    y, draw, steps = numbers(3, 3), draws(3), 3
    x = schedule.prior_std * draw()
    times = DDIM(N).times(schedule)
    for t, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in zip(
        times, pairwise(ladder(DDIM(N), schedule)), strict=False
    ):
        r_t, u = sigma_t / alpha_t, x / alpha_t
        last = float(schedule.ratio(min(schedule.t_min, float(t) / 2)))
        rungs = [*np.linspace(r_t ** (1 / 7), last ** (1 / 7), steps) ** 7, 0.0]
        for r, r_new in pairwise(rungs):
            alpha = float(schedule(schedule.t_from_ratio(r))[0])
            u = u + (r_new - r) * (u - denoised(alpha * u, alpha, alpha * r)) / r
        c, z = u @ VT.T, draw() @ VT.T
        c[:, 3] += r_t * z[:, 3]
        for i in range(3):
            variance = 1 / (1 / r_t**2 + S[i] ** 2 / sigma_y**2) if sigma_y else 0.0
            weight = variance / r_t**2
            c[:, i] = weight * c[:, i] + (1 - weight) * (y.numpy() @ U)[:, i] / S[i]
            c[:, i] += variance**0.5 * z[:, i]
        x = alpha_s * c @ VT + sigma_s * draw()
    close(run(DAPS(steps), DDIM(N), schedule, y, sigma_y), x, 1e-6)


@every_schedule
def test_pnpdm_matches_the_split_gibbs_sampler(schedule: Schedule) -> None:
    """ρ_k = max(ρ_max a^k, ρ_min). z comes from the exact conditional, x from the reverse SDE."""
    y, sigma_y, inner, draw = numbers(3, 3), 0.3, EulerMaruyama(3), keyed(3)
    x = torch.zeros_like(draw.normal(D, dtype=torch.float64))
    for rho in (2.0, 1.0, 0.5, 0.4):
        precision = A.T @ A / sigma_y**2 + np.eye(D) / rho**2
        mean = np.linalg.solve(precision, (y.numpy() @ A / sigma_y**2 + x.numpy() / rho**2).T).T
        noise = draw.normal(D, dtype=torch.float64).numpy() @ VT.T
        std = 1 / np.sqrt(np.append(S, 0) ** 2 / sigma_y**2 + 1 / rho**2)
        z = torch.from_numpy(mean + (std * noise) @ VT)
        x = TruncatedReverseSDE()(
            GaussianDenoiser(schedule), inner, Observation(z, rho), generator=draw
        )  # fmt: skip
    actual = run(PnPDM(4, rho_max=2.0, rho_min=0.4, decay=0.5), inner, schedule, y, sigma_y)
    torch.testing.assert_close(actual, x, rtol=1e-7, atol=1e-7)


@every_schedule
@with_and_without_noise
def test_reddiff_matches_adam_on_the_loss_of_the_paper(schedule: Schedule, sigma_y: float) -> None:
    y, draw, strength, lr = numbers(3, 3), draws(3), 0.25, 0.1
    if sigma_y == 0:
        mu = y.numpy() @ PINV.T
    else:
        mu = np.linalg.solve(A.T @ A + sigma_y**2 * np.eye(D), A.T @ y.numpy().T).T
    first, second, epsilon = 0.0, 0.0, draw()
    times = ladder(DDIM(N), schedule)
    for k, (alpha_t, sigma_t) in enumerate(times[:-1], start=1):
        x = alpha_t * mu + sigma_t * epsilon
        epsilon_hat = (x - alpha_t * denoised(x, alpha_t, sigma_t)) / sigma_t
        slope = D / 3 * (mu @ A.T - y.numpy()) @ A
        slope = slope + strength * sigma_t / alpha_t * (epsilon_hat - epsilon)
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        mu = mu - lr * first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.99**k)) + 1e-8)
        epsilon = draw() if k < len(times) - 1 else None
    close(run(REDDiff(strength, lr), DDIM(N), schedule, y, sigma_y), mu, 1e-5)


# --- relations between methods ------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.85, 0.3])
def test_step_of_ddnm_with_noise_equals_ddrm_with_eta_b_of_one(eta: float) -> None:
    """Single steps from the same state are compared, because the initial states differ."""
    observation = Observation(numbers(5, 3), 0.3, MATRIX)
    denoiser, x, z = GaussianDenoiser(Linear()), numbers(5, D), numbers(2, 5, D)[1]
    for t, s in pairwise(DDIM(12).times(Linear())):
        state = State(float(t), x, denoiser(x, t))
        one, other = (
            method.step(denoiser, observation, state, s, lambda _: z)
            for method in (DDNM(eta), DDRM(eta, 1.0))
        )
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


CONSISTENT = {k: METHODS[k] for k in METHODS if k not in ("pnpdm", "reddiff")}


@pytest.mark.parametrize("guidance", CONSISTENT.values(), ids=CONSISTENT.keys())
@every_schedule
def test_without_noise_samples_satisfy_the_observation(guidance, schedule: Schedule) -> None:
    y = numbers(3, 3)
    result = run(guidance, Ancestral(5), schedule, y, 0.0)
    torch.testing.assert_close(MATRIX(result), y, rtol=1e-9, atol=1e-9)
    noisy = run(guidance, Ancestral(5), schedule, y, 0.3)
    if not isinstance(guidance, ILVR):  # ILVR treats y as noise-free
        assert float((MATRIX(noisy) - y).abs().max()) > 1e-3


@pytest.mark.parametrize("guidance", CONSISTENT.values(), ids=CONSISTENT.keys())
def test_images_satisfy_the_observation_for_several_operators(guidance: Guidance) -> None:
    shape = (3, 8, 8)
    x_0 = numbers(2, *shape).clamp(-1, 1)
    operators = (
        BoxInpainting(shape),
        AveragePool(shape, 2),
        Grayscale(shape),
        MotionBlur(shape, 3.0),
    )
    for operator in operators[:3] if isinstance(guidance, ILVR) else operators:
        y = operator(x_0)
        denoiser, observation = Shrink(Linear()), Observation(y, 0.0, operator)
        result = guidance(denoiser, DDIM(3), observation, generator=keyed(2))
        assert result.shape == x_0.shape
        torch.testing.assert_close(operator(result), y, rtol=1e-6, atol=1e-6)


class Shrink(Denoiser):
    """E[x_0 | x_t] for x_0 ~ N(0, I), for images."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_t, sigma_t = self.schedule(t.double())
        return (alpha_t / (alpha_t**2 + sigma_t**2)).to(x_t) * x_t


def test_replacement_with_the_identity_operator() -> None:
    """Without noise the result is y. With noise, the method equals the truncated reverse SDE.

    The SDE starts at the last level with more noise than y, so the laws are equal if y is on a
    level.
    """
    y = numbers(3, D)
    result = run(Replacement(2), Ancestral(5), Linear(), y, 0.0, Identity())
    torch.testing.assert_close(result, y, rtol=0, atol=0)
    t = torch.tensor(12 / 20, dtype=torch.float64)
    sigma_y = float(Linear().ratio(t)) * (1 - 1e-12)
    whole = exact_moments(Replacement(), EulerMaruyama(20), y[0], sigma_y, Identity(), 41)
    part = exact_moments(TruncatedReverseSDE(), EulerMaruyama(12), y[0], sigma_y, Identity(), 13)
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("repeats, jump", [(3, 1), (2, 6)])
@pytest.mark.parametrize("sigma_y", [0.1, 0.5])
def test_repeats_keep_a_noisy_observation(sigma_y: float, repeats: int, jump: int) -> None:
    """All elements are observed: repeats do not change the samples, which are those given y.

    With jumps from levels below σ_y, each pass would forget a part of y.
    """
    y, sampler = numbers(1, D)[0], EulerMaruyama(20, grid=LogSNR())
    once, several = (
        exact_moments(method, sampler, y, sigma_y, Identity(), 60 * repeats, VP())
        for method in (Replacement(), Replacement(repeats, jump))
    )
    for one, other in zip(once, several, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    exact = Gaussian(MEAN, COVARIANCE).posterior(y, Identity(), sigma_y)
    assert float((once[0] - exact.means[0]).abs().max()) < 0.25 * sigma_y


def exact_moments(
    guidance: Guidance, sampler: Sampler, y: Tensor, sigma_y: float, operator: Operator,
    count: int, schedule: Schedule = SCHEDULES["linear"],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and covariance of the output of a method that makes at most `count` draws."""
    noise = BasisNoise(count, D)
    observation = Observation(y.expand(noise.rows, -1), sigma_y, operator)
    return moments(guidance(GaussianDenoiser(schedule), sampler, observation, generator=noise))


def test_replacement_with_one_repeat_does_not_depend_on_jump() -> None:
    y = numbers(3, 3)
    plain = run(Replacement(), Ancestral(N), Linear(), y, 0.3)
    assert torch.equal(run(Replacement(1, jump=3), Ancestral(N), Linear(), y, 0.3), plain)
    assert not torch.equal(run(Replacement(2, jump=3), Ancestral(N), Linear(), y, 0.3), plain)


@pytest.mark.parametrize("steps, repeats, jump", [(250, 10, 10), (20, 3, 4), (7, 2, 1), (5, 2, 9)])
def test_repaint_visits_the_times_of_the_paper(steps: int, repeats: int, jump: int) -> None:
    """The appendix: indices descend from T - 1, with r - 1 jumps up from every j-th index."""
    jumps = Counter({i: repeats - 1 for i in range(0, steps - jump, jump)})
    i, visited = steps, []
    while i > 0:
        i -= 1
        visited.append(i)
        if jumps[i] > 0:
            jumps[i] -= 1
            visited[-1] = i + jump  # the next step starts where the jump ended
            i += jump
    # Each entry is the index at which a step starts; a grid with N = T has the corresponding
    # times.
    path = TimeTravelSampler(Ancestral(steps), Linear(), repeats, jump).times(Linear())
    assert path[-1] == 0 and len(path) == len(visited) + 1
    assert [round(steps * t) - 1 for t in path[:-1].tolist()] == visited
    assert len(visited) == steps + (repeats - 1) * jump * ((steps - 1) // jump)
    if steps == 250:
        assert len(visited) == 2410


@every_method
def test_number_of_network_calls(guidance: Guidance) -> None:
    calls = {
        # One of two segments of two steps is repeated twice; the other is below ν_i.
        "Replacement": 6 + 2 * 2 if getattr(guidance, "repeats", 1) > 1 else 6,
        "DDNM": 6 + 3 if getattr(guidance, "repeats", 1) > 1 else 6,
        "DAPS": 6 * 2,
        "PnPDM": 6 * 3,
    }.get(type(guidance).__name__, 6)
    denoiser = Counting(GaussianDenoiser(Linear()))
    guidance(denoiser, Ancestral(6), Observation(numbers(2, 3), 0.3, MATRIX))
    assert denoiser.calls == calls


class Counting(Denoiser):
    """Counts the calls of a denoiser, and returns NaN after `good` calls."""

    def __init__(self, denoiser: Denoiser, good: int = 10**9) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.good, self.calls = denoiser, good, 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.denoiser(x_t, t) if self.calls <= self.good else torch.full_like(x_t, np.nan)


# --- exact conditional samples ------------------------------------------------------------------


def conditional(centre: Tensor, rho: float, y: Tensor, sigma_y: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of N(x; centre, ρ²) N(y; A x, σ_y²), from precision matrices."""
    a = torch.from_numpy(A)
    identity = torch.eye(D, dtype=torch.float64)
    covariance = torch.linalg.inv(a.T @ a / sigma_y**2 + identity / rho**2)
    return covariance @ (a.T @ y / sigma_y**2 + centre / rho**2), covariance


def step_moments(
    operator: Operator, centre: Tensor, rho: float, y: Tensor, sigma_y: float, steps: int = 1,
    size: float = 0.1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    basis = BasisNoise(steps, D)
    observation = Observation(y.expand(basis.rows, -1), sigma_y, operator)
    start, method = centre.expand(basis.rows, -1), PnPDM(langevin_steps=steps, step_size=size)
    x = method.likelihood_step(observation, start, rho, lambda _: basis.normal(D))
    return moments(x)


@pytest.mark.parametrize("rho", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("sigma_y", [0.01, 0.5])
def test_likelihood_step_samples_the_exact_conditional(rho: float, sigma_y: float) -> None:
    centre, y = numbers(D), numbers(3)
    mean, covariance = step_moments(MATRIX, centre, rho, y, sigma_y)
    expected = conditional(centre, rho, y, sigma_y)
    torch.testing.assert_close(mean, expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, expected[1], rtol=1e-8, atol=1e-8)


def test_likelihood_step_without_noise_samples_on_the_constraint_plane() -> None:
    centre, y = numbers(D), numbers(3)
    mean, covariance = step_moments(MATRIX, centre, 0.7, y, 0.0)
    close(mean, centre.numpy() + PINV @ (y.numpy() - A @ centre.numpy()))
    close(covariance, 0.7**2 * (np.eye(D) - PINV @ A))


@pytest.mark.parametrize(
    "size, tolerance", [(0.1, 0.12), pytest.param(0.02, 0.025, marks=pytest.mark.slow)]
)
def test_langevin_steps_for_nonlinear_operators_sample_the_conditional(size, tolerance) -> None:
    """The steps are scaled with σ_y, and the law is correct to first order in the step size.

    The singular values are at most 1.5, so that size 0.1 has an error of 0.1 1.5² / 2 = 11% or
    less.
    """
    centre, y, rho, sigma_y = numbers(D), numbers(3), 0.4, 0.3
    steps = round(40 / size)
    mean, covariance = step_moments(UnmarkedLinear(), centre, rho, y, sigma_y, steps, size)
    expected = conditional(centre, rho, y, sigma_y)
    torch.testing.assert_close(mean, expected[0], rtol=1e-6, atol=1e-6)
    values = torch.linalg.eigvals(torch.linalg.solve(expected[1], covariance)).real
    # For an eigenvalue p of the precision, the variance is too large by the factor 1 / (1 - h p /
    # 2).
    precision = torch.cat([torch.from_numpy(S) ** 2 / sigma_y**2, torch.zeros(1)]) + 1 / rho**2
    h = size / (1 / sigma_y**2 + 1 / rho**2)
    excess = (1 / (1 - h * precision / 2)).double()
    torch.testing.assert_close(values.sort().values, excess.sort().values, rtol=1e-4, atol=1e-4)
    assert 1 < float(excess.max()) < 1 + tolerance


def test_red_gradient_of_a_row_is_independent_of_other_rows() -> None:
    observation = Observation(numbers(5, 3), 0.3, UnmarkedLinear((D,)))
    mu, target = numbers(5, D), numbers(2, 5, D)[1]
    whole = red_gradient(observation, mu, target, 0.25)
    linear = red_gradient(Observation(observation.y, 0.3, MATRIX), mu, target, 0.25)
    torch.testing.assert_close(whole, linear)
    one = red_gradient(Observation(observation.y[3:4], 0.3, UnmarkedLinear((D,))), mu[3:4],
                       target[3:4], 0.25)  # fmt: skip
    torch.testing.assert_close(one, whole[3:4], rtol=1e-14, atol=1e-14)


# --- invariant distribution of PnP-DM -----------------------------------------------------------


def split_posterior(y: Tensor, sigma_y: float, rho: float) -> tuple[Tensor, Tensor]:
    """π_ρ(x) ∝ p(x) N(y; A x, σ_y² I + ρ² A Aᵀ), which is the posterior for ρ = 0."""
    a, precision = torch.from_numpy(A), torch.linalg.inv(COVARIANCE)
    noise = sigma_y**2 * torch.eye(3, dtype=torch.float64) + rho**2 * a @ a.T
    covariance = torch.linalg.inv(precision + a.T @ torch.linalg.solve(noise, a))
    right = precision @ MEAN + a.T @ torch.linalg.solve(noise, y)
    return covariance @ right, covariance


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Distance of the means in standard deviations plus relative distance of the covariances."""
    shift = torch.linalg.solve(torch.linalg.cholesky(other[1]), one[0] - other[0]).norm()
    return float(shift + (one[1] - other[1]).norm() / other[1].norm())


@pytest.mark.parametrize("rho, iterations, tolerance", [(0.6, 24, 0.035), (0.3, 60, 0.015)])
def test_pnpdm_samples_the_split_posterior(rho, iterations: int, tolerance: float) -> None:
    """ρ is constant.

    The remaining error is the first-order discretization error of the sampler.
    """
    y, sigma_y = torch.tensor([0.4, -0.5, 0.2], dtype=torch.float64), 0.3
    guidance, errors = PnPDM(iterations, rho_max=rho, rho_min=rho), []
    for steps in (8, 16):
        count = iterations * (1 + steps) + 1
        actual = exact_moments(guidance, EulerMaruyama(steps), y, sigma_y, MATRIX, count)
        errors.append(distance(actual, split_posterior(y, sigma_y, rho)))
    assert errors[1] < tolerance and errors[1] < 0.7 * errors[0]
    assert distance(actual, split_posterior(y, sigma_y, 0.0)) > 0.4  # ρ is still large


def test_pnpdm_variance_is_too_small_with_ddim_of_low_eta() -> None:
    """DDIM with η < 1 has the correct law of x, but not that of x given z."""
    y, sigma_y, spreads = torch.tensor([0.4, -0.5, 0.2], dtype=torch.float64), 0.3, []
    for eta in (0.5, 1.0):
        sampler, guidance = DDIM(16, eta=eta), PnPDM(24, rho_max=0.6, rho_min=0.6)
        actual = exact_moments(guidance, sampler, y, sigma_y, MATRIX, 24 * 17 + 1)
        spreads.append(float(actual[1].trace() / split_posterior(y, sigma_y, 0.6)[1].trace()))
    assert spreads[0] < 0.65 and spreads[1] > 0.75


def test_split_posterior_converges_to_the_posterior() -> None:
    """The error is O(ρ²); the chain uses the conditionals that the tests above verify."""
    y, sigma_y = torch.tensor([0.4, -0.5, 0.2], dtype=torch.float64), 0.3
    exact, identity = split_posterior(y, sigma_y, 0.0), torch.eye(D, dtype=torch.float64)
    errors = []
    for rho in (0.1, 0.05):
        # One iteration is x -> z -> x: z | x as in the test of the likelihood step, x | z by the
        # denoiser.
        zero, gain = torch.zeros(D, dtype=torch.float64), torch.linalg.inv(
            torch.linalg.inv(COVARIANCE) + identity / rho**2
        )  # fmt: skip
        offset, spread = conditional(zero, rho, y, sigma_y)
        step = gain @ spread / rho**4
        shift = gain @ (torch.linalg.solve(COVARIANCE, MEAN) + offset / rho**2)
        noise = gain + gain @ spread @ gain / rho**4
        mean = torch.linalg.solve(identity - step, shift)
        kron = torch.eye(D * D, dtype=torch.float64) - torch.kron(step, step)
        covariance = torch.linalg.solve(kron, noise.flatten()).reshape(D, D)
        expected = split_posterior(y, sigma_y, rho)
        torch.testing.assert_close(mean, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(covariance, expected[1], rtol=1e-6, atol=1e-6)
        errors.append(distance((mean, covariance), exact))
    assert errors[1] < 0.02 and 3.5 < errors[0] / errors[1] < 4.5


def test_daps_variance_is_too_large_for_any_number_of_levels() -> None:
    """As documented, N(x̂, r²) is wider than p(x_0 | x_t)."""
    y, sigma_y = torch.tensor([0.4, -0.5, 0.2], dtype=torch.float64), 0.3
    exact = split_posterior(y, sigma_y, 0.0)[1].trace()
    for levels in (20, 80):
        sampler = DDIM(levels, grid=LogSNR())
        moments_ = exact_moments(DAPS(6), sampler, y, sigma_y, MATRIX, 2 * levels + 1)
        assert 1.1 < float(moments_[1].trace() / exact) < 3


# --- RED-diff -----------------------------------------------------------------------------------


def test_red_gradient_matches_the_gradient_of_the_loss() -> None:
    """L = d/m ½ |y - A μ|² + λ r sg[ε̂ - ε]ᵀ μ, differentiated by autograd."""
    schedule, t = Linear(), torch.tensor(0.37, dtype=torch.float64)
    alpha, sigma = schedule(t)
    y, mu, epsilon = numbers(6, 3), numbers(6, D), numbers(2, 6, D)[1]
    denoiser = GaussianDenoiser(schedule)
    target = denoiser(alpha * mu + sigma * epsilon, t)
    mu = mu.requires_grad_()
    epsilon_hat = (alpha * mu + sigma * epsilon - alpha * target) / sigma
    misfit = D / 3 * (y - MATRIX(mu)).square().sum() / 2
    loss = misfit + 0.7 * sigma / alpha * ((epsilon_hat - epsilon).detach() * mu).sum()
    (expected,) = torch.autograd.grad(loss, mu)
    actual = red_gradient(Observation(y, 0.3, MATRIX), mu.detach(), target, 0.7)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def fixed_point(y: Tensor, strength: float, ratio: float) -> Tensor:
    """The solution μ of d/m Aᵀ (A μ - y) + λ r² (C + r²)⁻¹ (μ - m) = 0."""
    a, identity = torch.from_numpy(A), torch.eye(D, dtype=torch.float64)
    prior = strength * ratio**2 * torch.linalg.inv(COVARIANCE + ratio**2 * identity)
    return torch.linalg.solve(D / 3 * a.T @ a + prior, D / 3 * a.T @ y + prior @ MEAN)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_red_gradient_has_zero_mean_at_the_fixed_point(t: float) -> None:
    """The mean is over ε. Pairs ±ε give it exactly, because x̂ is linear in x_t."""
    schedule, t = Linear(), torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule(t)
    y, epsilon, denoiser = numbers(3), numbers(7, D), GaussianDenoiser(schedule)
    mu = fixed_point(y, 0.7, float(sigma / alpha)).expand(14, -1)
    target = denoiser(alpha * mu + sigma * torch.cat([epsilon, -epsilon]), t)
    slope = red_gradient(Observation(y.expand(14, -1), 0.3, MATRIX), mu, target, 0.7)
    assert float(slope.abs().max()) > 1e-3
    assert float(slope.mean(0).abs().max()) < 1e-10


def test_reddiff_converges_to_its_fixed_point_with_small_variance(caplog) -> None:
    steps, ratio, y, sigma_y = 800, 0.5, torch.tensor([0.4, -0.5, 0.02]).double(), 0.3
    grid = Ratios(*np.linspace(ratio + 1e-3, ratio, steps - 1))
    with caplog.at_level(logging.WARNING):
        result = run(
            REDDiff(0.7, lr=0.01), DDIM(steps, grid=grid), Linear(), y.expand(32, -1), sigma_y
        )
    torch.testing.assert_close(result.mean(0), fixed_point(y, 0.7, ratio), rtol=0, atol=0.01)
    assert float(result.var(0).sum()) < 0.05 * float(split_posterior(y, sigma_y, 0.0)[1].trace())
    assert "not a posterior" in caplog.text and not REDDiff.stochastic


# --- any schedule, batch and sampler ------------------------------------------------------------


STEPS = {
    "ddrm": DDRM(0.85, 0.7), "ddnm": DDNM(0.85), "diffpir": DiffPIR(7.0, 0.3), "daps": DAPS(3),
}  # fmt: skip
STEPS["daps"].ode = DDIM(3, grid=Ratios(0.5, 0.2))


@pytest.mark.parametrize("method", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("r_t, r_s", [(20.0, 5.0), (0.8, 0.6), (0.7, 0.0)])
def test_step_is_the_same_under_any_schedule(method: CustomStep, r_t: float, r_s: float) -> None:
    """The steps are compared in u = x_t / α_t, between the same two ratios."""
    u, z, results = numbers(5, D), numbers(3, 5, D)[1], []
    observation = Observation(numbers(5, 3), 0.3, MATRIX)
    for schedule in (Linear(), VP(), VE(), EDM()):
        t, s = (schedule.t_from_ratio(r) for r in (r_t, r_s))
        denoiser, (alpha_t, _), (alpha_s, _) = GaussianDenoiser(schedule), schedule(t), schedule(s)
        state = State(float(t), alpha_t * u, denoiser(alpha_t * u, t))
        results.append(method.step(denoiser, observation, state, s, lambda _: z) / alpha_s)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-7, atol=1e-7)


def test_pnpdm_is_the_same_under_any_schedule() -> None:
    sampler, y = DDIM(4, eta=0.7, grid=Ratios(0.2, 0.1, 0.05)), numbers(3, 3)
    guidance = PnPDM(5, rho_max=1.0, rho_min=0.3, decay=0.7)
    first, *others = (run(guidance, sampler, s, y, 0.3) for s in (Linear(), VP(), VE(), EDM()))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6)


@every_method
@pytest.mark.parametrize("operator", [MATRIX, UnmarkedLinear((D,))], ids=["linear", "not"])
def test_samples_do_not_depend_on_the_batch(guidance: Guidance, operator: Operator) -> None:
    if guidance.requires == "svd" and operator is not MATRIX:
        return
    y = numbers(5, 3)

    def draw(chosen: list[int]) -> Tensor:
        generator = KeyedGenerator(make_key(1, torch.tensor(chosen)))
        return run(guidance, Ancestral(5), Linear(), y[chosen], 0.3, operator, generator=generator)

    whole = draw([0, 1, 2, 3, 4])
    assert float((whole[0] - whole[1]).abs().max()) > 1e-3
    torch.testing.assert_close(draw([3, 1]), whole[[3, 1]], rtol=1e-9, atol=1e-9)


@every_method
def test_callback_gets_every_state(guidance: Guidance) -> None:
    states: list[State] = []
    result = run(guidance, Ancestral(6), Linear(), numbers(2, 3), 0.3, callback=states.append)
    assert torch.equal(states[-1].x_t, result) and torch.equal(states[-1].denoised, result)
    assert [state.t for state in states].count(0.0) == 1 and states[-1].t == 0
    expected = 3 if isinstance(guidance, PnPDM) else 0
    if not expected:
        denoiser = Counting(GaussianDenoiser(Linear()))
        guidance(denoiser, Ancestral(6), Observation(numbers(2, 3), 0.3, MATRIX))
        expected = denoiser.calls // getattr(guidance, "ode_steps", 1)
        assert states[0].t == 1
    assert len(states) == expected + 1
    denoiser = GaussianDenoiser(Linear())
    for state in states[:-1]:
        estimate = denoiser(state.x_t, torch.tensor(state.t, dtype=torch.float64))
        torch.testing.assert_close(state.denoised, estimate)
    assert not result.requires_grad


@every_method
def test_estimate_is_clipped_if_the_sampler_clips(guidance: Guidance) -> None:
    denoiser = GaussianDenoiser(Linear(), 3 * MEAN, COVARIANCE)
    for clip in (False, True):
        states: list[State] = []
        guidance(
            denoiser, Ancestral(6, clip=clip), Observation(numbers(4, 3), 0.3, MATRIX),
            generator=keyed(4), callback=states.append,
        )  # fmt: skip
        largest = max(float(state.denoised.abs().max()) for state in states[:-1])
        assert (largest <= 1) == clip


@every_method
def test_error_for_a_non_finite_state_names_the_step(guidance: Guidance) -> None:
    per_level = getattr(guidance, "ode_steps", 1)
    denoiser = Counting(GaussianDenoiser(Linear()), good=2 * per_level)
    pattern = r"not finite after step 3 of \d+ \(from t="
    if isinstance(guidance, PnPDM):
        denoiser.good, pattern = 8, r"iteration 2 of 3: .*" + pattern
    with pytest.raises(SamplingError, match=pattern):
        guidance(denoiser, Ancestral(6), Observation(numbers(2, 3), 0.3, MATRIX))


@every_method
@pytest.mark.parametrize("schedule", [VE(), Linear(zero_terminal_snr=True)], ids=["ve", "no_snr"])
def test_float32_samples_stay_float32_and_finite(guidance: Guidance, schedule: Schedule) -> None:
    """This includes a start from pure noise, where σ / α is 1e13."""
    observation = Observation(numbers(2, 3).float(), 0.3, MATRIX)
    for sampler in (Ancestral(6), Ancestral(6, grid=LogSNR())):
        result = guidance(Shrink(schedule), sampler, observation, generator=keyed(2))
        assert result.dtype == torch.float32 and float(result.abs().max()) < 100


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Replacement(0), "repeats=0 .*>= 1"),
        (lambda: Replacement(jump=0), "jump=0 .*>= 1"),
        (lambda: ILVR(1.0), r"t_stop=1.0 .*\[0, 1\)"),
        (lambda: DDRM(eta=1.1), r"eta=1.1 .*\[0, 1\]"),
        (lambda: DDRM(eta_b=-0.1), r"eta_b=-0.1 .*\[0, 1\]"),
        (lambda: DDNM(eta=float("nan")), r"eta=nan .*\[0, 1\]"),
        (lambda: DDNM(repeats=0), "repeats=0 .*>= 1"),
        (lambda: DiffPIR(prior_weight=0.0), "prior_weight=0.0 .*> 0"),
        (lambda: DiffPIR(zeta=2.0), r"zeta=2.0 .*\[0, 1\]"),
        (lambda: DAPS(ode_steps=0), "ode_steps=0 .*>= 1"),
        (lambda: DAPS(langevin_steps=0), "langevin_steps=0 .*>= 1"),
        (lambda: DAPS(step_size=2.0), r"step_size=2.0 .*\(0, 2\)"),
        (lambda: PnPDM(iterations=0), "iterations=0 .*>= 1"),
        (lambda: PnPDM(rho_max=0.1), "rho_min=0.3 and rho_max=0.1 .*at most rho_max"),
        (lambda: PnPDM(rho_min=0.0), "rho_min=0.0 .*> 0"),
        (lambda: PnPDM(decay=1.1), r"decay=1.1 .*\(0, 1\]"),
        (lambda: REDDiff(prior_weight=-1.0), "prior_weight=-1.0 .*>= 0"),
        (lambda: REDDiff(lr=0.0), "lr=0.0 .*> 0"),
    ],
)
def test_invalid_settings_are_an_error(make: Callable, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@every_method
def test_unsupported_operators_and_noise_are_an_error(guidance: Guidance) -> None:
    denoiser, y = GaussianDenoiser(Linear()), numbers(2, 3)

    def draw(sigma_y, operator=MATRIX) -> Tensor:
        return guidance(denoiser, Ancestral(2), Observation(y, sigma_y, operator))

    if guidance.requires == "svd":
        with pytest.raises(
            ValueError, match="UnmarkedLinear is not linear; choose another guidance"
        ):
            draw(0.3, UnmarkedLinear((D,)))
    elif guidance.stochastic:
        with pytest.raises(ValueError, match=r"sigma_y=0.0: .* set sigma_y above 0"):
            draw(0.0, UnmarkedLinear((D,)))
    draw(torch.tensor(0.3))
    if guidance.requires_scalar_noise:
        with pytest.raises(ValueError, match="noise of one standard deviation"):
            draw(torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("guidance", [Replacement(), ILVR()])
def test_incompatible_solver_is_an_error(guidance: Guidance) -> None:
    for sampler in (ProbabilityFlow(), UniPC()):
        with pytest.raises(
            ValueError, match=r"(would undo|overwrites) what .* choose another sampler"
        ):
            run(guidance, sampler, Linear(), numbers(2, 3), 0.3)
    run(guidance, DPMSolver(4), Linear(), numbers(2, 3), 0.3)


def test_repeats_with_a_multistep_solver_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"guidance.repeats=1 or choose another sampler"):
        run(Replacement(2), DPMSolver(4), Linear(), numbers(2, 3), 0.3)


def test_pnpdm_checks_rho_max_and_warns_of_deterministic_samplers(caplog) -> None:
    with pytest.raises(ValueError, match=r"rho_max=500.0 is outside .* set guidance.rho_max"):
        run(PnPDM(rho_max=500.0), Ancestral(2), VE(), numbers(2, 3), 0.3)
    with caplog.at_level(logging.WARNING):
        run(PnPDM(2), Ancestral(2), Linear(), numbers(2, 3), 0.3)
        assert not caplog.records
        run(PnPDM(2), DDIM(2), Linear(), numbers(2, 3), 0.3)
    assert "DDIM without noise does not draw x given z" in caplog.text


def test_ilvr_with_a_noise_amplifying_pseudo_inverse_is_an_error() -> None:
    blur = GaussianBlur((3, 16, 16), std=1.0)
    y = blur(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"multiplies noise by up to .* guidance=replacement"):
        ILVR().check(Observation(y, 0.0, blur))
    small = AveragePool((3, 16, 16), factor=4)
    ILVR().check(Observation(small(torch.zeros(1, 3, 16, 16)), 0.05, small))
