r"""Base class of samplers: a grid of times from t_start to 0, and the loop over it.

    x_{t_start} -> ... -> x_t -> x_s -> ... -> x_0.

A sampler defines only the step from t to s. Coefficients are computed in float64; the state keeps
the type of `start`.
"""

__all__ = ["Callback", "Generator", "Noise", "Sampler", "State"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.rng import KeyedGenerator, normal_like
from diffusion_lab.sampler.time_grid import TimeGrid, Uniform
from diffusion_lab.schedule import Schedule

Generator: TypeAlias = KeyedGenerator | torch.Generator | None


@dataclass(frozen=True)
class State:
    """Sampler state, passed to the callback before each step and once at t = 0.

    Attributes:
        t: The time.
        x_t: The state, of shape (B, *).
        denoised: The denoiser's E[x_0 | x_t]; at t = 0 the result itself.
        previous: The state before the last step, for multistep methods.
        variance_fraction: The learned variance of the reverse step, see
            `Denoiser.with_variance`; None if the denoiser has not learned it.
    """

    t: float
    x_t: Tensor
    denoised: Tensor
    previous: "State | None" = None
    variance_fraction: Tensor | None = None


FINITE_CHECK_INTERVAL = 16  # steps; each check synchronizes with the device. On a CPU it is 1

Callback: TypeAlias = Callable[[State], None]
Noise: TypeAlias = Callable[[Tensor], Tensor]  # draws z ~ N(0, I) like its argument


class Sampler(ABC):
    """A solver of the reverse process.

    Arguments:
        steps: The number N of steps.
        grid: The placement of the times; None for `default_grid`.
        clip: Whether the estimate of x_0 is clipped to [-1, 1] before each step: right for pixels,
            wrong for other data and for closed forms.

    Attributes:
        stochastic: Whether the result for a given start is random.
        default_grid: The class of the time grid if none is given.
        history: The number of earlier states that a step uses.
        supports_adjust: Whether x_s may be changed between steps, see `adjust` of a call.
    """

    stochastic = True
    default_grid: type[TimeGrid] = Uniform
    history = 0
    supports_adjust = True

    @checked
    def __init__(
        self, steps: PositiveInt, grid: TimeGrid | None = None, clip: bool = False
    ) -> None:
        self.steps = steps
        self.grid = grid or self.default_grid()
        self.clip = clip

    def times(self, schedule: Schedule, t_start: float = 1.0) -> Tensor:
        """Returns the times t_0 = t_start > ... > t_N = 0, float64, of shape (N + 1,)."""
        return self.grid(schedule, self.steps, t_start)

    def check(self, schedule: Schedule) -> None:  # noqa: B027 (empty by default)
        """Raises ValueError if the sampler is not defined under a schedule."""

    @abstractmethod
    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        """Returns x_s.

        Arguments:
            denoiser: For methods that call it again within the step.
            state: The state at time t, with E[x_0 | x_t].
            s: The next time, 0 <= s < t, float64, of shape ().
            noise: Draws z ~ N(0, I) of its argument's shape and type.
        """

    def correct(self, schedule: Schedule, state: State) -> State:
        """Returns a corrected state at the same time, given the estimate at the state."""
        return state

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        start: Tensor,
        *,
        t_start: float = 1.0,
        generator: Generator = None,
        callback: Callback | None = None,
        adjust: Callable[[State, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Samples x_0.

        Arguments:
            denoiser: E[x_0 | x_t].
            start: x at time t_start, of shape (B, *): noise for t_start = 1, see `Schedule.prior`.
            t_start: The start time in (0, 1].
            generator: The source of the noise; with keyed streams a sample does not depend on the
                batch that contains it.
            callback: Called with a `State` before every step and at the end.
            adjust: Returns the changed x_s after every step, given the state before it and x_s.

        Returns:
            x_0, of the shape and type of `start`.

        Raises:
            ValueError: If the sampler is not defined under the denoiser's schedule, or `adjust` is
                given and the sampler overwrites x_t (`supports_adjust` is false).
            SamplingError: If the state is not finite; names the step.
        """
        schedule = denoiser.schedule
        self.check(schedule)
        if adjust is not None and not self.supports_adjust:
            raise ValueError(
                f"{type(self).__name__} overwrites what this method changes after every step; "
                "choose another sampler: ancestral, euler_maruyama, ddim"
            )
        if self.clip:
            denoiser = Clipped(denoiser)
        state, x_t, times = None, start, self.times(schedule, t_start)
        finite, every = list[Tensor](), 1 if start.device.type == "cpu" else FINITE_CHECK_INTERVAL
        for k, (t, s) in enumerate(pairwise(times)):
            denoised, fraction = denoiser.with_variance(x_t, t)
            state = State(float(t), x_t, denoised, _shortened(state, self.history), fraction)
            state = self.correct(schedule, state)
            if callback is not None:
                callback(state)
            x_t = self.step(denoiser, state, s, lambda x: normal_like(x, generator))
            if adjust is not None:
                x_t = adjust(state, x_t)
            finite.append(torch.isfinite(x_t).all())
            if len(finite) == every or s == 0:
                self._check_finite(torch.stack(finite).tolist(), times, k + 1)
                finite.clear()
        if callback is not None:
            callback(State(0.0, x_t, x_t))
        return x_t

    def _check_finite(self, finite: list[bool], times: Tensor, step: int) -> None:
        """Raises SamplingError if one of the last states, up to `step`, was not finite."""
        if all(finite):
            return
        k = step - len(finite) + finite.index(False)
        raise SamplingError(
            f"{type(self).__name__}: x_t is not finite after step {k + 1} of {self.steps} "
            f"(from t={float(times[k]):.6g} to {float(times[k + 1]):.6g}). Check that the "
            "denoiser is trained at this noise level, or use more steps, another grid or clip=true"
        )


def _shortened(state: State | None, length: int) -> State | None:
    """The chain of the last `length` states; older ones are dropped."""
    if state is None or length == 0:
        return None
    return replace(state, previous=_shortened(state.previous, length - 1))
