"""Schedules against the formulas of their papers, computed independently in NumPy."""

import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import (
    EDM,
    VE,
    VP,
    Cosine,
    DiscreteSchedule,
    Flow,
    Laplace,
    Linear,
    Quadratic,
    Schedule,
    Sigmoid,
    SubVP,
)

DISCRETE = {
    "linear": Linear(),
    "quadratic": Quadratic(),
    "cosine": Cosine(),
    "sigmoid": Sigmoid(),
    "laplace": Laplace(),
    "laplace off centre": Laplace(mu=1.0, b=1.5),
    "short linear": Linear(beta_max=0.4, steps=25),
    "short cosine": Cosine(steps=40),
    "zero terminal snr": Linear(zero_terminal_snr=True),
    "shifted": Linear(shift=4.0),
    "shifted to nothing": Cosine(shift=0.5, zero_terminal_snr=True),
}
CONTINUOUS = {
    "vp": VP(),
    "vp from nothing": VP(0.0, 12.0),
    "subvp": SubVP(),
    "ve": VE(),
    "ve of score_sde": VE(0.02, 50.0),
    "edm": EDM(),
    "flow": Flow(),
}
ALL = {**DISCRETE, **CONTINUOUS}
every_discrete = pytest.mark.parametrize("schedule", DISCRETE.values(), ids=DISCRETE.keys())
every_continuous = pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS.keys())
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
TIMES = torch.linspace(0, 1, 2345, dtype=torch.float64)  # mostly between the indices


def alpha_bar(schedule: Schedule, index: int) -> float:
    """ᾱ_i, the value at t = (i + 1) / T."""
    t = torch.tensor((index + 1) / schedule.steps, dtype=torch.float64)
    return float(schedule(t)[0] ** 2)


def increments(schedule: Schedule) -> np.ndarray:
    return -np.expm1(np.diff(schedule.log_alpha_bar.numpy()))


@pytest.mark.parametrize("index", [0, 164, 499, 998, 999])
def test_linear_alpha_bar_matches_ddpm(index: int) -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]
    assert alpha_bar(Linear(), index) == pytest.approx(expected, rel=1e-12)


def test_linear_schedule_has_the_published_values() -> None:
    """The values at the end and halfway through the schedule are those of the literature."""
    linear = Linear()
    assert alpha_bar(linear, 999) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(linear.ratio(1.0)) == pytest.approx(157.4, abs=0.05)
    assert float(linear(0.5)[1]) == pytest.approx(0.96, abs=0.005)
    t = linear.t_from_ratio(0.5 / math.sqrt(0.75))  # σ_t = 0.5
    assert float(linear(t)[1]) == pytest.approx(0.5, abs=1e-12)
    assert 164 < float(linear.index(t)) < 165


def test_index_matches_ddpm() -> None:
    t = torch.tensor([0.001, 0.165, 0.5, 1.0, 0.1655], dtype=torch.float64)
    expected = torch.tensor([0, 164, 499, 999, 164.5], dtype=torch.float64)
    torch.testing.assert_close(Linear().index(t), expected, rtol=0, atol=1e-10)
    assert float(Linear(steps=20).index(torch.tensor(0.5))) == 9


def test_cosine_matches_its_closed_form_below_the_cap() -> None:
    k = np.arange(1000)  # all but the last, whose increment is capped
    f = np.cos((k / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_t = Cosine()(torch.arange(1000, dtype=torch.float64) / 1000)[0]
    np.testing.assert_allclose(alpha_t.numpy() ** 2, f / f[0], rtol=1e-9)
    assert increments(Cosine())[-1] == pytest.approx(0.999, rel=1e-12)
    assert alpha_bar(Cosine(), 999) == pytest.approx(2.43e-9, rel=0.01)


@pytest.mark.parametrize("start, end, tau", [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.9), (-3.0, 3.0, 0.3)])
def test_sigmoid_matches_its_closed_form_below_the_cap(
    start: float, end: float, tau: float
) -> None:
    t = np.arange(1000) / 1000
    v = 1 / (1 + np.exp(-(start + t * (end - start)) / tau))
    v_0, v_1 = (1 / (1 + np.exp(-edge / tau)) for edge in (start, end))
    alpha_t, _ = Sigmoid(start, end, tau)(torch.from_numpy(t))
    np.testing.assert_allclose(alpha_t.numpy() ** 2, (v_1 - v) / (v_1 - v_0), rtol=1e-9)


def test_symmetric_sigmoid_has_equal_signal_and_noise_at_t_one_half() -> None:
    alpha_t, sigma_t = Sigmoid()(torch.tensor(0.5, dtype=torch.float64))
    assert float(alpha_t**2) == pytest.approx(0.5, abs=1e-12)
    assert float(sigma_t**2) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("beta_min, beta_max", [(1e-4, 0.02), (0.00085, 0.012)])
def test_quadratic_matches_the_scaled_linear_schedule_of_ddim(
    beta_min: float, beta_max: float
) -> None:
    i = np.arange(1000)
    root = np.sqrt(beta_min) + i / 999 * (np.sqrt(beta_max) - np.sqrt(beta_min))
    quadratic = Quadratic(beta_min, beta_max)
    np.testing.assert_allclose(increments(quadratic), root**2, rtol=1e-10)
    expected = np.cumprod(1 - root**2)[[0, 500, 999]]
    for index, alpha_bar_i in zip((0, 500, 999), expected, strict=True):
        assert alpha_bar(quadratic, index) == pytest.approx(alpha_bar_i, rel=1e-11)


@pytest.mark.parametrize("mu, b", [(0.0, 0.5), (1.0, 1.5), (-2.0, 0.3)])
def test_laplace_log_snr_is_the_quantile_of_the_laplace_distribution(mu: float, b: float) -> None:
    """With t uniform, log SNR ~ Laplace(μ, b): t is one minus its distribution function."""
    k = np.arange(1, 1000)  # the last increment is capped
    t = k / 1000
    log_snr = np.where(t < 0.5, mu - b * np.log(2 * t), mu + b * np.log(2 * (1 - t)))
    ratio = Laplace(mu, b).ratio(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(-2 * np.log(ratio), log_snr, rtol=0, atol=1e-9)
    assert increments(Laplace(mu, b))[-1] == pytest.approx(0.999, rel=1e-12)


def test_laplace_alpha_bar_is_the_square_of_that_of_diffusers() -> None:
    """diffusers uses the root of ᾱ in place of ᾱ, and adds 1e-6 inside the logarithm."""
    reference = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="laplace")
    k = torch.arange(1, 1000, dtype=torch.float64)
    alpha_t = Laplace()(k / 1000)[0].numpy()
    theirs = reference.alphas_cumprod.double().numpy()[:-1]
    # With the added 1e-6, the SNR at t = 0 is 1e3 instead of infinity; other values are relative
    # to it.
    start = (1e-6**-0.5 / (1 + 1e-6**-0.5)) ** 0.5
    np.testing.assert_allclose(theirs * start, alpha_t, rtol=3e-4)
    assert abs(theirs[499] * start - 0.5**0.5) < 1e-5 and abs(theirs[499] - 0.5) > 0.2


def test_zero_terminal_snr_matches_diffusers() -> None:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    theirs = (1 - rescale_zero_terminal_snr(beta)).cumprod(0).sqrt()
    ours = Linear(zero_terminal_snr=True)
    k = torch.arange(1, 1001, dtype=torch.float64)
    alpha_t, sigma_t = ours(k / 1000)
    torch.testing.assert_close(alpha_t[:-1], theirs[:-1], rtol=1e-9, atol=0)
    # In float32, division by it is finite.
    assert float(theirs[-1]) == 0 and 0 < float(alpha_t[-1]) < 1e-12
    assert float(sigma_t[-1]) == 1 and float(ours.ratio(1.0)) > 1e12
    assert float(alpha_t[0]) == pytest.approx(math.sqrt(1 - 1e-4), rel=1e-12)


@pytest.mark.parametrize("shift", [0.25, 4.0])
@pytest.mark.parametrize("make", [Linear, Quadratic, Cosine, Sigmoid, Laplace])
def test_shift_multiplies_the_noise_to_signal_ratio(
    make: type[DiscreteSchedule], shift: float
) -> None:
    """The log SNR is lower by 2 log s (Hoogeboom et al., eq. 4) at every index."""
    k = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = shift * make().ratio(k)
    torch.testing.assert_close(make(shift=shift).ratio(k), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "schedule, name",
    [(Linear(), "linear"), (Cosine(), "squaredcos_cap_v2"), (Quadratic(), "scaled_linear")],
    ids=["linear", "cosine", "quadratic"],
)
def test_betas_match_diffusers(schedule: Schedule, name: str) -> None:
    reference = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    np.testing.assert_allclose(increments(schedule), reference.betas.numpy(), rtol=2e-6)


# --- continuous time ----------------------------------------------------------------------------


def vp(t: np.ndarray, beta_min: float, beta_max: float) -> tuple[np.ndarray, np.ndarray]:
    """Song et al., eq. 33: the exponent of the mean is -¼ t² (β_max - β_min) - ½ t β_min."""
    exponent = -(t**2) / 4 * (beta_max - beta_min) - t / 2 * beta_min
    return np.exp(exponent), np.sqrt(1 - np.exp(2 * exponent))


def subvp(t: np.ndarray, beta_min: float, beta_max: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean of VP, with the standard deviation equal to the variance of VP."""
    alpha_t, sigma_t = vp(t, beta_min, beta_max)
    return alpha_t, sigma_t**2


def ve(t: np.ndarray, sigma_min: float, sigma_max: float) -> tuple[np.ndarray, np.ndarray]:
    """σ(t)² - σ(0)² with σ(t) = σ_min (σ_max / σ_min)^t."""
    path = sigma_min * (sigma_max / sigma_min) ** t
    return np.ones_like(t), np.sqrt(path**2 - sigma_min**2)


def edm(t: np.ndarray, sigma_max: float) -> tuple[np.ndarray, np.ndarray]:
    return np.ones_like(t), sigma_max * t


def flow(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 1 - (1 - 1e-5) * t, t


@pytest.mark.parametrize(
    "schedule, closed",
    [
        (VP(), lambda t: vp(t, 0.1, 20.0)),
        (VP(0.0, 12.0), lambda t: vp(t, 0.0, 12.0)),
        (SubVP(), lambda t: subvp(t, 0.1, 20.0)),
        (VE(), lambda t: ve(t, 0.01, 348.0)),
        (VE(0.02, 50.0), lambda t: ve(t, 0.02, 50.0)),
        (EDM(), lambda t: edm(t, 80.0)),
        (Flow(), flow),
    ],
    ids=["vp", "vp 0", "subvp", "ve", "ve 50", "edm", "flow"],
)
def test_continuous_schedules_match_their_closed_forms(
    schedule: Schedule, closed: Callable
) -> None:
    t = np.linspace(0.01, 1, 100)
    for ours, expected in zip(schedule(torch.from_numpy(t)), closed(t), strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)


def test_t_min_has_the_minimal_noise_level() -> None:
    for sigma_min, sigma_max in ((0.01, 348.0), (0.02, 50.0), (1e-3, 1e3)):
        schedule = VE(sigma_min, sigma_max)
        assert float(schedule.ratio(schedule.t_min)) == pytest.approx(sigma_min, rel=1e-9)
        expected = math.sqrt(sigma_max**2 - sigma_min**2)
        assert float(schedule.ratio(1.0)) == pytest.approx(expected, rel=1e-12)
        assert schedule.prior_std == pytest.approx(expected, rel=1e-6)
    assert float(EDM(0.01, 50.0).ratio(EDM(0.01, 50.0).t_min)) == pytest.approx(0.01, rel=1e-12)
    assert Linear(steps=40).t_min == 1 / 40 and Flow(t_min=0.01).t_min == 0.01
    assert VP(t_min=1e-5).t_min == SubVP(t_min=1e-5).t_min == 1e-5


def test_edm_index_is_linear_in_the_log_of_sigma() -> None:
    """The index is 0 at σ_min and T - 1 at σ_max.

    It equals c_noise = ln σ / 4 of Karras et al. up to a linear map.
    """
    sigma = np.array([0.002, 0.4, 5.0, 80.0])
    index = EDM().index(torch.from_numpy(sigma / 80))
    expected = 999 * np.log(sigma / 0.002) / np.log(80 / 0.002)
    np.testing.assert_allclose(index.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_vp_is_the_limit_of_ddpm() -> None:
    """With β_i = β(t) / T, the difference in α is O(1 / T), and below 5e-3 at T = 1000."""
    t = torch.arange(1, 51, dtype=torch.float64) / 50
    errors = []
    for steps in (250, 500, 1000, 2000):
        discrete = Linear(0.1 / steps, 20 / steps, steps)
        errors.append(float((discrete(t)[0] - VP()(t)[0]).abs().max()))
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, rtol=0.05)
    assert 2e-4 < errors[2] < 5e-3


# --- all schedules ------------------------------------------------------------------------------


@every_schedule
def test_variance_preserving_attribute_is_correct_and_noise_increases(schedule: Schedule) -> None:
    alpha_t, sigma_t = schedule(TIMES)
    deviation = float((alpha_t**2 + sigma_t**2 - 1).abs().max())
    assert deviation < 1e-14 if schedule.variance_preserving else deviation > 0.1
    assert bool((schedule.ratio(TIMES).diff() > 0).all())


@every_schedule
def test_time_zero_has_no_noise(schedule: Schedule) -> None:
    for zero in (0.0, torch.tensor(0.0), torch.zeros(2, 3, dtype=torch.float64)):
        alpha_t, sigma_t = schedule(zero)
        assert bool((alpha_t == 1).all()) and bool((sigma_t == 0).all())
    assert float(schedule.ratio(0.0)) == 0 and float(schedule.t_from_ratio(0.0)) == 0


@every_discrete
def test_log_alpha_bar_is_linear_between_the_indices(schedule: Schedule) -> None:
    k = torch.arange(schedule.steps + 1, dtype=torch.float64)
    log_alpha = schedule(k / schedule.steps)[0].log()
    quarter = schedule((k[:-1] + 0.25) / schedule.steps)[0].log()
    torch.testing.assert_close(quarter, 0.75 * log_alpha[:-1] + 0.25 * log_alpha[1:])


@every_schedule
def test_t_from_ratio_is_the_inverse_of_ratio(schedule: Schedule) -> None:
    alpha_t, sigma_t = schedule(TIMES)
    ratio = schedule.ratio(TIMES)
    torch.testing.assert_close(ratio, sigma_t / alpha_t, rtol=1e-9, atol=0)
    points = torch.arange(schedule.steps + 1, dtype=torch.float64) / schedule.steps
    tiny = torch.logspace(-9, -2, 50, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.t_from_ratio(schedule.ratio(tiny)), tiny, rtol=1e-6, atol=0
    )
    for t in (TIMES, points, TIMES.reshape(5, -1)):
        inverse = schedule.t_from_ratio(schedule.ratio(t))
        assert inverse.dtype == torch.float64
        torch.testing.assert_close(inverse, t, rtol=0, atol=1e-9)
    for ratio in (schedule.ratio(1.0), float(schedule.ratio(1.0))):
        assert float(schedule.t_from_ratio(ratio)) == pytest.approx(1, rel=0, abs=1e-15)


def test_equal_ratios_give_equal_alpha_and_sigma_in_two_vp_schedules() -> None:
    t = Cosine().t_from_ratio(Linear().ratio(torch.tensor(0.3, dtype=torch.float64)))
    for ours, theirs in zip(Cosine()(t), Linear()(torch.tensor(0.3).double()), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-7)


@pytest.mark.parametrize("bad", [-1e-9, 157.5, math.inf, math.nan, torch.tensor([1.0, 200.0])])
def test_ratio_outside_the_schedule_is_an_error(bad: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"Linear, whose range is 0 to 157\.4"):
        Linear().t_from_ratio(bad)


def differentiable(schedule: Schedule) -> Tensor:
    """Times inside the intervals of a table, or from 0.002 to 0.998 for a continuous schedule."""
    if isinstance(schedule, DiscreteSchedule):
        k = torch.arange(schedule.steps - 1, dtype=torch.float64)  # the last interval is steep
        return (k + 0.4) / schedule.steps
    return torch.linspace(0.002, 0.998, 250, dtype=torch.float64)


@every_schedule
def test_drift_and_diffusion_match_numerical_derivatives(schedule: Schedule) -> None:
    """f = d log α / dt and g² = dσ²/dt - 2 f σ² are computed by central differences."""
    t, h = differentiable(schedule), 1e-3 / schedule.steps
    (alpha_1, sigma_1), (alpha_2, sigma_2) = schedule(t - h), schedule(t + h)
    slope = (alpha_2.log() - alpha_1.log()) / (2 * h)
    torch.testing.assert_close(schedule.drift(t), slope, rtol=1e-6, atol=1e-6)
    growth = (sigma_2**2 - sigma_1**2) / (2 * h)
    squared = growth - 2 * slope * schedule(t)[1] ** 2
    torch.testing.assert_close(schedule.diffusion(t) ** 2, squared, rtol=1e-5, atol=1e-6)


def quadrature(function: Callable[[Tensor], Tensor], ends: np.ndarray) -> np.ndarray:
    """The integral from ends[0] to each other end, by Gauss-Legendre quadrature."""
    nodes, weights = leggauss(8)
    half = np.diff(ends)[:, None] / 2
    t = (ends[:-1, None] + half) + half * nodes
    return ((function(torch.from_numpy(t)).numpy() * weights).sum(1) * half[:, 0]).cumsum()


@every_schedule
def test_diffusion_integral_matches_quadrature(schedule: Schedule) -> None:
    """G(t) = ∫_0^t g², at and between the points of a table.

    In each interval of a table g is constant.
    """
    if isinstance(schedule, DiscreteSchedule):
        table = np.arange(schedule.steps + 1) / schedule.steps
        ends = np.union1d(table, table[:-1] + 0.3 / schedule.steps)
    else:
        ends = 1 - np.linspace(1, 0, 401) ** 4  # finest at t = 1, where g² of Flow is 2e5
    expected = quadrature(lambda t: schedule.diffusion(t) ** 2, ends)
    actual = schedule.diffusion_integral(torch.from_numpy(ends[1:])).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert float(schedule.diffusion_integral(0.0)) == 0


@every_discrete
def test_drift_is_finite_at_both_ends(schedule: Schedule) -> None:
    slopes = schedule.log_alpha_bar.diff() / 2 * schedule.steps
    for t, expected in ((0.0, slopes[0]), (1.0, slopes[-1])):
        assert float(schedule.drift(t)) == pytest.approx(float(expected), rel=1e-9)


@every_schedule
def test_float32_coefficients_are_correctly_rounded(schedule: Schedule) -> None:
    """The computation is in float64, so this holds also at the ends, where 1 - ᾱ or ᾱ is tiny."""
    times = torch.cat([TIMES, torch.tensor([1e-6, 1 - 1e-6]).double()]).float()
    for single, double in zip(schedule(times), schedule(times.double()), strict=True):
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1.2e-7, atol=0)
    assert all(c.dtype == torch.float32 for c in schedule(0.3))


def test_sigma_is_accurate_near_time_zero() -> None:
    """In the first interval, σ_t² = 1 - (1 - β_0)^(tT)."""
    t = torch.tensor([1e-12, 1e-9, 1e-6], dtype=torch.float64)
    expected = [math.sqrt(-math.expm1(1000 * s * math.log1p(-1e-4))) for s in t.tolist()]
    np.testing.assert_allclose(Linear()(t)[1].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Linear(beta_min=0.0), r"beta_min=0\.0 .* a number in \(0, 1\)$"),
        (lambda: Linear(beta_max=1.0), r"beta_max=1\.0"),
        (lambda: Linear(beta_max=float("nan")), "beta_max=nan"),
        (lambda: Linear(0.02, 0.02), r"beta_min=0\.02 must be below beta_max=0\.02"),
        (lambda: Cosine(steps=1), "steps=1 .* an integer >= 2$"),
        (lambda: DiscreteSchedule(torch.tensor([0.1, -0.1])), "-0.1 to 0.1"),
        (lambda: Sigmoid(start=1.0, end=1.0), r"start=1\.0 must be below end=1\.0"),
        (lambda: Quadratic(beta_min=0.0), r"beta_min=0\.0"),
        (lambda: Quadratic(beta_max=1.0), r"beta_max=1\.0"),
        (lambda: Laplace(b=0.0), r"b=0\.0"),
        (lambda: Laplace(b=-1.0), r"b=-1\.0"),
        (lambda: Linear(shift=0.0), r"shift=0\.0"),
        (lambda: Cosine(shift=float("nan")), "shift=nan"),
        (lambda: VP(20.0, 0.1), r"beta_min=20\.0 must be below beta_max=0\.1"),
        (lambda: SubVP(-0.1, 20.0), r"beta_min=-0\.1"),
        (lambda: VP(beta_max=float("nan")), "beta_max=nan"),
        (lambda: VE(0.0, 10.0), r"sigma_min=0\.0"),
        (lambda: VE(10.0, 10.0), r"sigma_min=10\.0 must be below sigma_max=10\.0"),
        (lambda: EDM(2.0, 1.0), "sigma_min=2.0 must be below sigma_max=1.0"),
        (lambda: EDM(sigma_min=-1.0), r"sigma_min=-1\.0"),
        (lambda: EDM(sigma_max=float("nan")), "sigma_max=nan"),
    ],
)
def test_invalid_arguments_are_an_error(make: Callable[[], Schedule], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@every_schedule
def test_prior_has_the_standard_deviation_of_time_one(schedule: Schedule) -> None:
    sigma_1 = float(schedule(torch.ones((), dtype=torch.float64))[1])
    expected = 1.0 if schedule.variance_preserving else sigma_1
    assert schedule.prior_std == pytest.approx(expected, rel=1e-7)
    x = schedule.prior((50, 2000), torch.Generator().manual_seed(0)).double()
    spread = float(x.square().mean().sqrt()) / expected
    assert (
        abs(spread - 1) < 4 * math.sqrt(1 / (2 * 1e5)) and abs(float(x.mean())) < 0.02 * expected
    )


@every_schedule
@pytest.mark.parametrize("mean_square", [0.0, 0.3, 1.7])
def test_prior_kl_matches_torch_distributions(schedule: Schedule, mean_square: float) -> None:
    """The reference averages over the images ±√(E x_0²).

    This is sufficient, since the KL divergence depends on x_0² only.
    """
    x_0 = math.sqrt(mean_square) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    alpha_1, sigma_1 = schedule(torch.ones(2, dtype=torch.float64))
    s = torch.full_like(x_0, schedule.prior_std)
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(alpha_1 * x_0, sigma_1),
        torch.distributions.Normal(torch.zeros_like(x_0), s),
    ).mean()
    actual = schedule.prior_kl(mean_square)
    assert actual == pytest.approx(float(nats) / math.log(2), rel=1e-6, abs=1e-12)


def test_prior_kl_of_linear_and_ve_has_the_expected_value() -> None:
    """½ ᾱ E x_0² - ½ ᾱ - ½ log(1 - ᾱ) ≈ ½ ᾱ E x_0², which is 7.28e-6 bits for E x_0² = ¼."""
    expected = 0.5 * 4.0358e-5 * 0.25 / math.log(2)
    assert Linear().prior_kl(0.25) == pytest.approx(expected, rel=1e-3)
    assert VE(0.01, 50.0).prior_kl(1.0) == pytest.approx(0.5 / 2500 / math.log(2), rel=1e-4)


def test_prior_of_linear_is_standard_normal_noise() -> None:
    x = Linear().prior((3, 2, 5), torch.Generator().manual_seed(1))
    assert torch.equal(x, torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)))
    key = make_key(0, torch.arange(3))
    x = Linear().prior((3, 2, 5), KeyedGenerator(key))
    assert torch.equal(x, KeyedGenerator(key).normal(2, 5))


@every_schedule
def test_state_dict_does_not_contain_the_table(schedule: Schedule) -> None:
    assert not schedule.state_dict()
