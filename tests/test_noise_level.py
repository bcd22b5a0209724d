"""Noise levels: four equivalent ways to specify one, and errors for invalid values."""

import math
import re
from typing import Any

import pytest
import torch

from diffusion_lab.errors import ConfigError
from diffusion_lab.noise_level import KEYS, NoiseLevel, chosen, resolve
from diffusion_lab.schedule import EDM, VE, VP, Cosine, Flow, Linear, Schedule, Sigmoid, SubVP

CONTINUOUS = [VP(), SubVP(), VE(), EDM(), Flow()]


@pytest.mark.parametrize(
    "schedule", [Linear(), Cosine(), Sigmoid(), *CONTINUOUS], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("key", KEYS)
def test_four_ways_to_specify_a_level_agree(schedule: Schedule, key: str) -> None:
    level = resolve(schedule, {"sigma_t": 0.3})
    again = resolve(schedule, {key: getattr(level, key), **dict.fromkeys(set(KEYS) - {key})})
    for name in KEYS:
        assert getattr(again, name) == pytest.approx(getattr(level, name), rel=1e-9), name
    alpha_t, sigma_t = schedule(torch.tensor(level.t, dtype=torch.float64))
    if schedule.variance_preserving:
        assert float(sigma_t) == pytest.approx(0.3, rel=1e-9)
    # On every schedule, sigma_t is that of the variance-preserving form.
    assert float(sigma_t / torch.hypot(alpha_t, sigma_t)) == pytest.approx(0.3, rel=1e-9)
    assert level.sigma_y == pytest.approx(float(sigma_t / alpha_t), rel=1e-9)
    assert level.snr_db == pytest.approx(20 * math.log10(alpha_t / sigma_t), rel=1e-9)


@pytest.mark.parametrize("values", [{"sigma_t": 0.5}, {}, {"sigma_t": None, "t": None}])
def test_default_level_on_the_linear_schedule(values: dict[str, Any]) -> None:
    level = resolve(Linear(), values)
    assert level.sigma_t == pytest.approx(0.5, rel=1e-12)
    assert level.sigma_y == pytest.approx(0.57735, abs=5e-6)
    assert level.snr_db == pytest.approx(4.771, abs=5e-4)
    assert 165 / 1000 < level.t < 166 / 1000  # between DDPM's indices 164 and 165


def test_sigma_t_at_t_one_half_depends_on_the_schedule() -> None:
    assert resolve(Linear(), {"t": 0.5}).sigma_t == pytest.approx(0.96, abs=0.005)
    assert resolve(Linear(), {"t": 0.5}).sigma_y == pytest.approx(3.4, abs=0.05)
    assert resolve(Cosine(), {"t": 0.5}).sigma_t == pytest.approx(0.71, abs=0.005)


def test_both_ends_of_the_schedule_are_allowed() -> None:
    assert resolve(Linear(), {"t": 1}).t == 1.0
    assert resolve(Linear(), {"t": 0.001}).sigma_t == pytest.approx(0.01, rel=1e-9)  # √β_0
    assert resolve(Linear(), {"snr_db": 0}).sigma_y == 1.0


@pytest.mark.parametrize(
    "schedule, t_min, low, high",
    [
        (VE(), 0.0331416, 0.01, 348.0),
        (VE(0.02, 50.0), 0.0442960, 0.02, 50.0),
        (EDM(), 2.5e-5, 0.002, 80.0),
        (Flow(), 1e-3, 1.001001e-3, 1e5),
        (VP(), 1e-3, 0.0104872, 152.17),
        (SubVP(), 1e-3, 1.0995e-4, 152.16),
    ],
    ids=["ve", "ve_50", "edm", "flow", "vp", "subvp"],
)
def test_both_ends_of_a_continuous_schedule_are_allowed(
    schedule: Schedule, t_min: float, low: float, high: float
) -> None:
    assert schedule.t_min == pytest.approx(t_min, rel=1e-5)
    ends = [resolve(schedule, {"t": t}) for t in (schedule.t_min, 1.0)]
    assert [level.sigma_y for level in ends] == pytest.approx([low, high], rel=2e-4)
    for level in ends:
        again = resolve(schedule, {"sigma_y": level.sigma_y})
        assert again.t == pytest.approx(level.t, rel=1e-9)
    for key, value in (("t", 0.99 * t_min), ("sigma_y", 0.99 * low), ("sigma_y", 1.01 * high)):
        with pytest.raises(ConfigError, match=rf"{key}={value}.*\({type(schedule).__name__}\)"):
            resolve(schedule, {key: value})


@pytest.mark.parametrize("other", ["t", "sigma_y", "snr_db"])
def test_two_specifications_of_the_level_are_an_error(other: str) -> None:
    with pytest.raises(ConfigError, match=f"sigma_t=0.5 and {other}=0.25 all set the noise level"):
        chosen({"sigma_t": 0.5, other: 0.25})


@pytest.mark.parametrize(
    "key, value",
    [
        *[(key, value) for key in KEYS for value in (math.nan, math.inf, "abc", "0.5", True, [])],
        *[("sigma_t", value) for value in (0, 0.0, 1, 1.0, -1, 1.5, 1e-9, 0.9999999, 1 - 1e-16)],
        *[("t", value) for value in (0, -1, 1.0001, 2, 1e-9, 0.0009)],
        *[("sigma_y", value) for value in (0, -1, 0.0099, 157.5, 1e300)],
        *[("snr_db", value) for value in (41, -44, 1e5, -1e5)],
    ],
)
def test_error_names_the_key_and_the_invalid_value(key: str, value: Any) -> None:
    shown = "true" if value is True else value
    with pytest.raises(ConfigError, match=re.escape(f"{key}={shown}")):
        resolve(Linear(), {key: value})


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("sigma_t", 1, r"in \(0, 1\)"),
        ("t", 1.5, r"in \(0, 1\]"),
        ("sigma_y", -1, "a number > 0"),
        ("snr_db", "ten", "a number"),
    ],
)
def test_error_states_the_allowed_values(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}={value} is not .*{allowed}$"):
        chosen({key: value})


def test_error_for_a_level_outside_the_schedule_gives_the_range() -> None:
    with pytest.raises(ConfigError, match=r"sigma_y=200.*Linear.*sigma_y=0\.01 to 157\.4"):
        resolve(Linear(), {"sigma_y": 200})
    # The cosine schedule has a larger range.
    assert resolve(Cosine(), {"sigma_y": 200}).sigma_y == 200


def test_str_of_a_level_has_all_four_values() -> None:
    level = NoiseLevel(sigma_t=0.5, t=0.16512, sigma_y=0.577350, snr_db=4.7712)
    assert str(level) == "sigma_t = 0.5, t = 0.1651, sigma_y = 0.5774, snr_db = 4.771"
