r"""Grids: the times t_0 = t_start > t_1 > ... > t_N = 0 at which a sampler calls the denoiser.

A grid is a choice of its own: any sampler takes any grid. All but the uniform one end at the
schedule's smallest time of training t_min, and a last step removes the noise that is left there.

Sources:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, appendix D.2 (quadratic).
    Lu et al., "DPM-Solver", 2022, section 3.3 (log SNR).
    Karras et al., "Elucidating the design space", 2022, eq. 5 (ρ).
"""

__all__ = ["Grid", "Karras", "LogSNR", "Quadratic", "Uniform"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.schedule import Schedule
from diffusion_lab.schedule.base import LARGEST


class Grid(ABC):
    """Places the times."""

    @abstractmethod
    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        """Returns the times t_start > ... > 0, float64, of shape (steps + 1,).

        Arguments:
            schedule: The schedule that they are of.
            steps: The number N of steps, at least 1.
            t_start: The time to start from, in (0, 1].
        """


class Uniform(Grid):
    """t_k = t_start (1 - k / N): every DDPM index for N = T."""

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        k = torch.arange(steps + 1, dtype=torch.float64)
        return t_start * (1 - k / steps)


class Quadratic(Grid):
    """t_k = t_start (1 - k / N)²: more steps at little noise."""

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        return t_start * (Uniform()(schedule, steps, 1.0)) ** 2


class _InRatio(Grid):
    """Evenly spaced in some function of the ratio r, from t_start to t_min, then 0."""

    @abstractmethod
    def _warp(self, ratio: Tensor) -> Tensor:
        """The function in which the levels are evenly spaced."""

    @abstractmethod
    def _unwarp(self, value: Tensor) -> Tensor:
        """Its inverse."""

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        t_min = min(schedule.t_min, t_start / 2)
        ends = schedule.ratio(torch.tensor([t_start, t_min], dtype=torch.float64)).cpu()
        first, last = self._warp(ends.clamp(max=LARGEST))  # above, there is nothing to solve
        share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        ratio = self._unwarp(torch.lerp(first, last, share))
        times = schedule.t_from_ratio(ratio).cpu()
        times[0] = t_start
        return torch.cat([times, times.new_zeros(1)])


class LogSNR(_InRatio):
    """log r_k evenly spaced, and so the log SNR."""

    def _warp(self, ratio: Tensor) -> Tensor:
        return torch.log(ratio)

    def _unwarp(self, value: Tensor) -> Tensor:
        return torch.exp(value)


class Karras(_InRatio):
    """r_k^{1/ρ} evenly spaced.

    Arguments:
        rho: ρ, at least 1; the larger, the more steps at little noise, up to `LogSNR`.

    Raises:
        ValueError: If ρ is below 1.
    """

    def __init__(self, rho: float = 7.0) -> None:
        if not rho >= 1:
            raise ValueError(f"rho={rho} is not allowed; it is at least 1")
        self.rho = rho

    def _warp(self, ratio: Tensor) -> Tensor:
        return ratio ** (1 / self.rho)

    def _unwarp(self, value: Tensor) -> Tensor:
        return value**self.rho
