"""Schedules against their papers' formulas, computed independently in NumPy."""

import math

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lab.noise import KeyedGenerator, make_key
from diffusion_lab.schedule import Cosine, Linear, Schedule, Sigmoid

SCHEDULES = [Linear(), Cosine(), Sigmoid(), Linear(beta_max=0.4, steps=25), Cosine(steps=40)]
TIMES = torch.linspace(0, 1, 2345, dtype=torch.float64)  # mostly between the indices


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{type(s).__name__}{s.steps}")
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


def alpha_bar(schedule: Schedule, index: int) -> float:
    """ᾱ_i, which is at t = (i + 1) / T."""
    t = torch.tensor((index + 1) / schedule.steps, dtype=torch.float64)
    return float(schedule(t)[0] ** 2)


def increments(schedule: Schedule) -> np.ndarray:
    return -np.expm1(np.diff(schedule.log_alpha_bar.numpy()))


@pytest.mark.parametrize("index", [0, 164, 499, 998, 999])
def test_linear_is_ddpm(index: int) -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]
    assert alpha_bar(Linear(), index) == pytest.approx(expected, rel=1e-12)


def test_linear_at_landmarks() -> None:
    """The figures of the literature: what is left of the image at the end and half way."""
    linear = Linear()
    assert alpha_bar(linear, 999) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(linear.ratio(1.0)) == pytest.approx(157.4, abs=0.05)
    assert float(linear(0.5)[1]) == pytest.approx(0.96, abs=0.005)
    t = linear.t_from_ratio(0.5 / math.sqrt(0.75))  # σ_t = 0.5
    assert float(linear(t)[1]) == pytest.approx(0.5, abs=1e-12)
    assert 164 < float(linear.index(t)) < 165


def test_index_is_that_of_ddpm() -> None:
    t = torch.tensor([0.001, 0.165, 0.5, 1.0, 0.1655], dtype=torch.float64)
    expected = torch.tensor([0, 164, 499, 999, 164.5], dtype=torch.float64)
    torch.testing.assert_close(Linear().index(t), expected, rtol=0, atol=1e-10)
    assert float(Linear(steps=20).index(torch.tensor(0.5))) == 9


def test_cosine_is_the_closed_form_below_the_cap() -> None:
    k = np.arange(1000)  # all but the last, whose increment is capped
    f = np.cos((k / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_t = Cosine()(torch.arange(1000, dtype=torch.float64) / 1000)[0]
    np.testing.assert_allclose(alpha_t.numpy() ** 2, f / f[0], rtol=1e-9)
    assert increments(Cosine())[-1] == pytest.approx(0.999, rel=1e-12)
    assert alpha_bar(Cosine(), 999) == pytest.approx(2.43e-9, rel=0.01)


@pytest.mark.parametrize("start, end, tau", [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.9), (-3.0, 3.0, 0.3)])
def test_sigmoid_is_the_closed_form_below_the_cap(start: float, end: float, tau: float) -> None:
    t = np.arange(1000) / 1000
    v = 1 / (1 + np.exp(-(start + t * (end - start)) / tau))
    v_0, v_1 = (1 / (1 + np.exp(-edge / tau)) for edge in (start, end))
    alpha_t, _ = Sigmoid(start, end, tau)(torch.from_numpy(t))
    np.testing.assert_allclose(alpha_t.numpy() ** 2, (v_1 - v) / (v_1 - v_0), rtol=1e-9)


def test_the_middle_of_a_symmetric_sigmoid_is_half_an_image() -> None:
    alpha_t, sigma_t = Sigmoid()(torch.tensor(0.5, dtype=torch.float64))
    assert float(alpha_t**2) == pytest.approx(0.5, abs=1e-12)
    assert float(sigma_t**2) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    "schedule, name", [(Linear(), "linear"), (Cosine(), "squaredcos_cap_v2")], ids=["lin", "cos"]
)
def test_increments_are_those_of_diffusers(schedule: Schedule, name: str) -> None:
    reference = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=name)
    np.testing.assert_allclose(increments(schedule), reference.betas.numpy(), rtol=2e-6)


def test_variance_is_preserved_and_noise_grows(schedule: Schedule) -> None:
    alpha_t, sigma_t = schedule(TIMES)
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones_like(TIMES), rtol=0, atol=1e-14)
    assert bool((sigma_t.diff() > 0).all())


def test_time_zero_is_exactly_clean(schedule: Schedule) -> None:
    for zero in (0.0, torch.tensor(0.0), torch.zeros(2, 3, dtype=torch.float64)):
        alpha_t, sigma_t = schedule(zero)
        assert bool((alpha_t == 1).all()) and bool((sigma_t == 0).all())
    assert float(schedule.ratio(0.0)) == 0 and float(schedule.t_from_ratio(0.0)) == 0


def test_between_the_indices_log_alpha_bar_is_linear(schedule: Schedule) -> None:
    k = torch.arange(schedule.steps + 1, dtype=torch.float64)
    log_alpha = schedule(k / schedule.steps)[0].log()
    quarter = schedule((k[:-1] + 0.25) / schedule.steps)[0].log()
    torch.testing.assert_close(quarter, 0.75 * log_alpha[:-1] + 0.25 * log_alpha[1:])


def test_ratio_and_its_inverse(schedule: Schedule) -> None:
    alpha_t, sigma_t = schedule(TIMES)
    ratio = schedule.ratio(TIMES)
    torch.testing.assert_close(ratio, sigma_t / alpha_t, rtol=1e-9, atol=0)
    points = torch.arange(schedule.steps + 1, dtype=torch.float64) / schedule.steps
    for t in (TIMES, points, TIMES.reshape(5, -1)):
        inverse = schedule.t_from_ratio(schedule.ratio(t))
        assert inverse.dtype == torch.float64
        torch.testing.assert_close(inverse, t, rtol=0, atol=1e-9)
    assert float(schedule.t_from_ratio(schedule.ratio(1.0))) == 1.0
    assert float(schedule.t_from_ratio(float(schedule.ratio(1.0)))) == 1.0


def test_two_schedules_meet_at_the_ratio() -> None:
    t = Cosine().t_from_ratio(Linear().ratio(torch.tensor(0.3, dtype=torch.float64)))
    for ours, theirs in zip(Cosine()(t), Linear()(torch.tensor(0.3).double()), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-7)


@pytest.mark.parametrize("bad", [-1e-9, 157.5, math.inf, math.nan, torch.tensor([1.0, 200.0])])
def test_a_ratio_outside_the_schedule_is_refused(bad: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"Linear, which reaches from 0 to 157\.4"):
        Linear().t_from_ratio(bad)


def test_drift_and_diffusion_are_the_derivatives(schedule: Schedule) -> None:
    """f = d log α / dt and g² = dσ²/dt - 2 f σ², by central differences within an interval."""
    k = torch.arange(schedule.steps - 1, dtype=torch.float64)  # cosine's last interval is steep
    t, h = (k + 0.4) / schedule.steps, 1e-3 / schedule.steps
    (alpha_1, sigma_1), (alpha_2, sigma_2) = schedule(t - h), schedule(t + h)
    slope = (alpha_2.log() - alpha_1.log()) / (2 * h)
    torch.testing.assert_close(schedule.drift(t), slope, rtol=1e-6, atol=1e-6)
    growth = (sigma_2**2 - sigma_1**2) / (2 * h)
    squared = growth - 2 * slope * schedule(t)[1] ** 2
    torch.testing.assert_close(schedule.diffusion(t) ** 2, squared, rtol=1e-5, atol=1e-6)


def test_drift_is_finite_at_both_ends(schedule: Schedule) -> None:
    beta = increments(schedule)
    for t, b in ((0.0, beta[0]), (1.0, beta[-1])):
        expected = math.log1p(-b) / 2 * schedule.steps
        assert float(schedule.drift(t)) == pytest.approx(expected, rel=1e-9)


def test_float32_loses_only_its_own_rounding(schedule: Schedule) -> None:
    """Also at the ends, where 1 - ᾱ and ᾱ are tiny: the computation is in float64."""
    times = torch.cat([TIMES, torch.tensor([1e-6, 1 - 1e-6]).double()]).float()
    for single, double in zip(schedule(times), schedule(times.double()), strict=True):
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1.2e-7, atol=0)
    assert all(c.dtype == torch.float32 for c in schedule(0.3))


def test_no_digits_are_lost_near_zero() -> None:
    """σ_t² = 1 - (1 - β_0)^(tT) exactly within the first interval."""
    t = torch.tensor([1e-12, 1e-9, 1e-6], dtype=torch.float64)
    expected = [math.sqrt(-math.expm1(1000 * s * math.log1p(-1e-4))) for s in t.tolist()]
    np.testing.assert_allclose(Linear()(t)[1].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Linear(beta_min=0.0), "Linear"),
        (lambda: Linear(beta_max=1.0), "Linear"),
        (lambda: Linear(beta_max=float("nan")), "Linear"),
        (lambda: Schedule(torch.tensor([0.1, -0.1])), "-0.1 to 0.1"),
        (lambda: Sigmoid(start=1.0, end=1.0), "Sigmoid"),
    ],
)
def test_increments_outside_the_range_are_refused(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_the_prior_is_standard_normal_noise() -> None:
    x = Linear().prior((3, 2, 5), torch.Generator().manual_seed(1))
    assert torch.equal(x, torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)))
    key = make_key(0, torch.arange(3))
    x = Linear().prior((3, 2, 5), KeyedGenerator(key))
    assert torch.equal(x, KeyedGenerator(key).normal(2, 5))


def test_the_table_is_not_in_checkpoints(schedule: Schedule) -> None:
    assert not schedule.state_dict()
