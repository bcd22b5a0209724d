r"""Noise level of an observation, given by one of four equivalent quantities.

A noisy image is y = x_0 + σ_y n, or up to a factor x_t = α_t x_0 + σ_t n with α_t² + σ_t² = 1:

    σ_y = σ_t / α_t = σ_t / √(1 - σ_t²),    SNR = 20 log10(1 / σ_y) dB,

and t is the time at which the run's schedule has this ratio. The same t means different levels:
t = 0.5 is σ_t = 0.96 on a linear schedule and 0.71 on a cosine schedule.
"""

__all__ = ["KEYS", "NoiseLevel", "resolve"]

import math
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_lab.constraints import Number, OpenUnit, Positive, PositiveUnit, allows, describe
from diffusion_lab.errors import ArgumentError, ConfigError
from diffusion_lab.schedule import Schedule

ALLOWED: dict[str, Any] = {
    "sigma_t": OpenUnit, "t": PositiveUnit, "sigma_y": Positive, "snr_db": Number,
}  # fmt: skip
KEYS = tuple(ALLOWED)
DEFAULT = ("sigma_t", 0.5)


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level under a schedule.

    Attributes:
        sigma_t: Standard deviation σ_t of the variance-preserving form.
        t: The schedule's time.
        sigma_y: Standard deviation σ_y of the noise added to x_0 in [-1, 1].
        snr_db: Signal-to-noise ratio 20 log10(α/σ), in dB.
    """

    sigma_t: float
    t: float
    sigma_y: float
    snr_db: float

    def __str__(self) -> str:
        return (
            f"sigma_t = {self.sigma_t:.4g}, t = {self.t:.4g}, sigma_y = {self.sigma_y:.4g}, "
            f"snr_db = {self.snr_db:.4g}"
        )


def chosen(values: dict[str, float | None]) -> tuple[str, float]:
    """Returns the key that is given and its value, or the default.

    Raises:
        ConfigError: If more than one is given, or the value is not allowed.
    """
    given = {key: v for key in KEYS if (v := values.get(key)) is not None}
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(f'{k}={v}' for k, v in given.items())} all set the noise level; "
            "give only one of them"
        )
    key, value = next(iter(given.items()), DEFAULT)
    if not allows(ALLOWED[key], value):
        raise ConfigError(str(ArgumentError(key, value, describe(ALLOWED[key]))))
    return key, value


def resolve(schedule: Schedule, values: dict[str, float | None]) -> NoiseLevel:
    """Returns the noise level in all four quantities.

    Arguments:
        schedule: The schedule of the run.
        values: At most one of sigma_t, t, sigma_y and snr_db that is not None.

    Raises:
        ConfigError: If the level is not allowed, or outside the range of the schedule.
    """
    key, value = chosen(values)
    if key == "t":
        sigma_y = float(schedule.ratio(torch.tensor(value, dtype=torch.float64)))
    elif key == "sigma_t":
        sigma_y = value / math.sqrt(1 - value**2)
    elif key == "sigma_y":
        sigma_y = value
    else:
        sigma_y = 10 ** (-max(value, -1000.0) / 20)
    low, high = schedule.ratio_range()
    if not low <= sigma_y <= high:
        raise ConfigError(
            f"{key}={value} means sigma_y={sigma_y:.4g}, which is outside the run's schedule "
            f"({type(schedule).__name__}); its noise levels are from sigma_y={low:.4g} to "
            f"{high:.4g}"
        )
    return NoiseLevel(
        sigma_t=sigma_y / math.sqrt(1 + sigma_y**2),
        t=float(schedule.t_from_ratio(sigma_y)),
        sigma_y=sigma_y,
        snr_db=-20 * math.log10(sigma_y),
    )
