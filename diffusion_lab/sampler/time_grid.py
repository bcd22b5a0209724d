r"""Time grids: the times t_0 = t_start > t_1 > ... > t_N = 0 of a sampler's steps.

Any sampler works with any grid. `LogSNR` and `Karras` end at the schedule's smallest training time
t_min, and a last step to 0 removes the remaining noise.

Sources:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, appendix D.2 (quadratic).
    Lu et al., "DPM-Solver", 2022, section 3.3 (log SNR).
    Karras et al., "Elucidating the design space", 2022, eq. 5 (ρ).
"""

__all__ = ["Karras", "LogSNR", "Quadratic", "TimeGrid", "Uniform"]

from abc import ABC, abstractmethod
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.constraints import Range, checked
from diffusion_lab.schedule import Schedule
from diffusion_lab.schedule.base import MAX_RATIO


class TimeGrid(ABC):
    """Placement of a sampler's times."""

    @abstractmethod
    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        """Returns the times t_start > ... > 0, float64, of shape (steps + 1,).

        Arguments:
            schedule: The schedule.
            steps: The number N of steps, at least 1.
            t_start: The start time in (0, 1].
        """


class Uniform(TimeGrid):
    """Uniform in t, t_k = t_start (1 - k / N): every DDPM index for N = T."""

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        k = torch.arange(steps + 1, dtype=torch.float64)
        return t_start * (1 - k / steps)


class Quadratic(TimeGrid):
    """Quadratic in t, t_k = t_start (1 - k / N)²: more steps at low noise."""

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        return t_start * (Uniform()(schedule, steps, 1.0)) ** 2


class _InRatio(TimeGrid):
    """Uniform in a function of the ratio r, from t_start to t_min, then 0."""

    @abstractmethod
    def _warp(self, ratio: Tensor) -> Tensor:
        """The function in which the levels are uniform."""

    @abstractmethod
    def _unwarp(self, value: Tensor) -> Tensor:
        """Its inverse."""

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        t_min = min(schedule.t_min, t_start / 2)
        ends = schedule.ratio(torch.tensor([t_start, t_min], dtype=torch.float64)).cpu()
        first, last = self._warp(ends.clamp(max=MAX_RATIO))  # above it x is pure noise
        weight = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        ratio = self._unwarp(torch.lerp(first, last, weight))
        times = schedule.t_from_ratio(ratio).cpu()
        times[0] = t_start
        return torch.cat([times, times.new_zeros(1)])


class LogSNR(_InRatio):
    """Uniform in log r, and so in log SNR."""

    def _warp(self, ratio: Tensor) -> Tensor:
        return torch.log(ratio)

    def _unwarp(self, value: Tensor) -> Tensor:
        return torch.exp(value)


class Karras(_InRatio):
    """Uniform in r^{1/ρ} (EDM).

    Arguments:
        rho: ρ; a larger one places more steps at low noise, with `LogSNR` as the limit.
    """

    @checked
    def __init__(self, rho: Annotated[float, Range(1)] = 7.0) -> None:
        self.rho = rho

    def _warp(self, ratio: Tensor) -> Tensor:
        return ratio ** (1 / self.rho)

    def _unwarp(self, value: Tensor) -> Tensor:
        return value**self.rho
