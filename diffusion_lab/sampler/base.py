r"""What all samplers share: a grid of times from t_start to 0, and a loop over it.

    x_{t_start} -> ... -> x_t -> x_s -> ... -> x_0,    t_k = t_start (1 - k / N), k = 0, ..., N.

A sampler defines only the step from t to s. Coefficients are computed in float64, the state keeps
the type of `start`.
"""

__all__ = ["Callback", "Generator", "Sampler", "State"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.noise import KeyedGenerator, normal_like
from diffusion_lab.schedule import Schedule

Generator: TypeAlias = KeyedGenerator | torch.Generator | None


@dataclass(frozen=True)
class State:
    """Where a sampler stands: once before every step, and once at the end with t = 0.

    Attributes:
        t: The time.
        x_t: The state, of shape (B, *).
        denoised: The denoiser's E[x_0 | x_t]; at t = 0 the result itself.
    """

    t: float
    x_t: Tensor
    denoised: Tensor


Callback: TypeAlias = Callable[[State], None]


class Sampler(ABC):
    """Turns noise into samples.

    Arguments:
        steps: The number N of steps.
        clip: Whether the estimate of x_0 is clipped to [-1, 1] before each step: right for pixels,
            wrong for any other data and for closed forms.

    Raises:
        ValueError: If `steps` is below 1.
    """

    stochastic = True  # whether one start leads to many results

    def __init__(self, steps: int, clip: bool = False) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} is not allowed; a sampler takes at least 1 step")
        self.steps = steps
        self.clip = clip

    def times(self, t_start: float = 1.0) -> Tensor:
        """Returns the grid t_0 = t_start > ... > t_N = 0, float64, of shape (N + 1,)."""
        k = torch.arange(self.steps + 1, dtype=torch.float64)
        return t_start * (1 - k / self.steps)

    def clipped(self, denoiser: Denoiser) -> Denoiser:
        """Returns the denoiser that the steps see: clipped if `clip` says so."""
        return Clipped(denoiser) if self.clip else denoiser

    @abstractmethod
    def step(
        self, schedule: Schedule, x_t: Tensor, denoised: Tensor, t: Tensor, s: Tensor, z: Tensor
    ) -> Tensor:
        """Returns x_s.

        Arguments:
            schedule: The schedule that t and s are of.
            x_t: The state at time t, of shape (B, *).
            denoised: E[x_0 | x_t], of shape (B, *).
            t: The time, of shape ().
            s: The next time, 0 <= s < t, of shape ().
            z: Normal noise of x_t's shape; without effect at s = 0.
        """

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        start: Tensor,
        *,
        t_start: float = 1.0,
        generator: Generator = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples x_0.

        Arguments:
            denoiser: E[x_0 | x_t].
            start: x at time t_start, of shape (B, *): noise for t_start = 1, see `Schedule.prior`.
            t_start: The time to start from, in (0, 1].
            generator: Where the noise comes from; keyed streams make each sample independent of
                the batch that it is computed in.
            callback: Called with a `State` before every step and at the end.
        """
        denoiser = self.clipped(denoiser)
        times, x_t = self.times(t_start), start
        for t, s in pairwise(times):
            denoised = denoiser(x_t, t)
            if callback is not None:
                callback(State(float(t), x_t, denoised))
            z = normal_like(x_t, generator)
            x_t = self.step(denoiser.schedule, x_t, denoised, t, s, z)
        if callback is not None:
            callback(State(0.0, x_t, x_t))
        return x_t
