"""Training times: quantiles and densities against independent integrals."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from diffusion_lab.loss import Likelihood
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.schedule import EDM, VE, VP, Cosine, Flow, Linear, Schedule, SubVP
from diffusion_lab.timesteps import Importance, LogNormal, Uniform

CONTINUOUS = {"vp": VP(), "subvp": SubVP(), "ve": VE(), "edm": EDM(), "flow": Flow()}
SCHEDULES = {"linear": Linear(), "cosine": Cosine(), **CONTINUOUS}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
LAST = 1 - 2.0**-53  # the largest value of u


def midpoints(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# --- uniform ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1000, 40])
def test_uniform_times_match_ddpm(steps: int) -> None:
    """Each k / T, k = 1, ..., T, has an equal share of u: DDPM's t ~ {1, ..., T}."""
    t, factor = Uniform()(midpoints(3 * steps), Linear(steps=steps))
    expected = torch.arange(1, steps + 1, dtype=torch.float64).repeat_interleave(3) / steps
    assert torch.equal(t, expected) and bool((factor == 1).all())
    ends, _ = Uniform()(torch.tensor([0.0, LAST], dtype=torch.float64), Linear(steps=steps))
    assert ends.tolist() == [1 / steps, 1.0]


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS.keys())
def test_uniform_times_of_continuous_schedules_span_t_min_to_one(schedule: Schedule) -> None:
    u = torch.tensor([0.0, 0.25, 0.5, LAST], dtype=torch.float64)
    t, factor = Uniform()(u, schedule)
    low = schedule.t_min
    expected = [low, low + (1 - low) / 4, (1 + low) / 2, 1.0]
    np.testing.assert_allclose(t.numpy(), expected, rtol=1e-15)
    assert bool((factor == 1).all()) and bool((t <= 1).all())


# --- log-normal ---------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (-0.4, 1.0)])
def test_log_normal_levels_match_the_quantiles(
    schedule: Schedule, mean: float, std: float
) -> None:
    u = midpoints(200)
    t, factor = LogNormal(mean, std)(u, schedule)
    ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)).log()
    expected = norm.ppf(u.numpy(), mean, std).clip(*ends.numpy())
    np.testing.assert_allclose(schedule.ratio(t).log().numpy(), expected, rtol=0, atol=1e-9)
    assert bool((factor == 1).all())


@every_schedule
def test_log_normal_levels_are_clipped_to_the_schedule(schedule: Schedule) -> None:
    """This includes u = 0, whose quantile is -∞."""
    u = torch.tensor([0.0, 1e-300, LAST], dtype=torch.float64)
    t, _ = LogNormal(mean=0.0, std=10.0)(u, schedule)
    assert t.tolist() == pytest.approx([schedule.t_min, schedule.t_min, 1.0], rel=1e-9)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_log_normal_with_invalid_std_is_an_error(std: float) -> None:
    with pytest.raises(ValueError, match=f"std={std}"):
        LogNormal(std=std)


# --- importance ---------------------------------------------------------------------------------


def distribution(schedule: Schedule, t: Tensor) -> np.ndarray:
    """∫ g² / σ² from t_min to t, divided by that from t_min to 1, by the midpoint rule.

    For a DDPM table the density is discontinuous at every index, so no interval contains an index.
    """
    indices = np.arange(1, 1001) / 1000
    knots = np.union1d(np.geomspace(schedule.t_min, 1, 40_001), indices)
    knots = knots[knots >= schedule.t_min]
    if isinstance(schedule, Flow):  # resolve 1 / (1 - t)
        knots = np.union1d(knots, 1 - np.geomspace(1e-8, 0.5, 40_001))
    middle = torch.from_numpy((knots[:-1] + knots[1:]) / 2)
    density = (schedule.diffusion(middle) / schedule(middle)[1]).square().numpy()
    mass = np.concatenate([[0.0], (density * np.diff(knots)).cumsum()])
    return np.interp(t.numpy(), knots, mass / mass[-1])


@every_schedule
def test_importance_times_follow_their_density(schedule: Schedule) -> None:
    """The distribution function maps every t to its u."""
    u = midpoints(500)
    t, _ = Importance()(u, schedule)
    np.testing.assert_allclose(distribution(schedule, t), u.numpy(), rtol=0, atol=5e-4)


@every_schedule
def test_importance_times_are_uniform_in_the_log_of_the_ratio(schedule: Schedule) -> None:
    """g² / σ² = 2 d log r / dt for every schedule."""
    u = midpoints(500)
    t, _ = Importance()(u, schedule)
    ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)).log()
    expected = torch.lerp(ends[0], ends[1], u)
    np.testing.assert_allclose(schedule.ratio(t).log(), expected, rtol=0, atol=0.01)
    assert bool((t >= schedule.t_min).all()) and bool((t <= 1).all())


@every_schedule
def test_importance_factor_makes_means_unbiased(schedule: Schedule) -> None:
    """The mean of factor times f(t) over u equals the mean of f over [t_min, 1]."""
    t, factor = Importance()(midpoints(1 << 17), schedule)
    low = schedule.t_min
    functions = {
        "1": (torch.ones_like, 1.0),
        "t": (lambda t: t, (1 + low) / 2),
        "t²": (lambda t: t**2, (1 - low**3) / 3 / (1 - low)),
        "√t": (torch.sqrt, (1 - low**1.5) / 1.5 / (1 - low)),
        "cos 9t": (lambda t: torch.cos(9 * t), (math.sin(9) - math.sin(9 * low)) / 9 / (1 - low)),
    }
    for name, (f, mean) in functions.items():
        actual = float((factor * f(t)).mean())
        assert actual == pytest.approx(mean, rel=2e-3, abs=2e-4), name


@every_schedule
def test_importance_makes_the_likelihood_weight_constant(schedule: Schedule) -> None:
    """The weight of the ε error is constant up to the resolution of the table.

    For a DDPM table, some intervals contain a discontinuity of the density.
    """
    t, factor = Importance()(midpoints(2000), schedule)
    weight = factor * Likelihood().output_weight(schedule, Epsilon(), t)
    ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)).log()
    mean = 2 * float(ends[1] - ends[0]) / (1 - schedule.t_min)  # the mean of g² / σ² over t
    assert float(weight.median()) == pytest.approx(mean, rel=1e-3)
    deviation = (weight / mean - 1).abs()
    if schedule in CONTINUOUS.values():
        assert float(deviation.max()) < 0.004
    else:
        assert float(deviation.quantile(0.99)) < 0.03
