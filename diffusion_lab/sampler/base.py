r"""What all samplers share: a grid of times from t_start to 0, and a loop over it.

    x_{t_start} -> ... -> x_t -> x_s -> ... -> x_0.

A sampler defines only the step from t to s. Coefficients are computed in float64, the state keeps
the type of `start`.
"""

__all__ = ["Callback", "Generator", "Noise", "Sampler", "State", "transition"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.rng import KeyedGenerator, normal_like
from diffusion_lab.sampler.time_grid import Grid, Uniform
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition

Generator: TypeAlias = KeyedGenerator | torch.Generator | None


@dataclass(frozen=True)
class State:
    """Where a sampler stands: once before every step, and once at the end with t = 0.

    Attributes:
        t: The time.
        x_t: The state, of shape (B, *).
        denoised: The denoiser's E[x_0 | x_t]; at t = 0 the result itself.
        previous: The state before, for multistep methods.
        share: What the denoiser has learned of the variance, see `Denoiser.with_share`.
    """

    t: float
    x_t: Tensor
    denoised: Tensor
    previous: "State | None" = None
    share: Tensor | None = None


ASKED = 16  # steps after which a device is asked whether the states were finite, and waited for

Callback: TypeAlias = Callable[[State], None]
Noise: TypeAlias = Callable[[Tensor], Tensor]  # draws z ~ N(0, I) like its argument


class Sampler(ABC):
    """Turns noise into samples.

    Arguments:
        steps: The number N of steps.
        grid: Where the times are; None takes the sampler's own choice.
        clip: Whether the estimate of x_0 is clipped to [-1, 1] before each step: right for pixels,
            wrong for any other data and for closed forms.

    Raises:
        ValueError: If `steps` is below 1.
    """

    stochastic = True  # whether one start leads to many results
    own_grid: type[Grid] = Uniform
    memory = 0  # how many states before the present one a step looks at
    adjustable = True  # whether a change of x_s from outside lasts

    def __init__(self, steps: int, grid: Grid | None = None, clip: bool = False) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} is not allowed; a sampler takes at least 1 step")
        self.steps = steps
        self.grid = grid or self.own_grid()
        self.clip = clip

    def times(self, schedule: Schedule, t_start: float = 1.0) -> Tensor:
        """Returns the grid t_0 = t_start > ... > t_N = 0, float64, of shape (N + 1,)."""
        return self.grid(schedule, self.steps, t_start)

    def check(self, schedule: Schedule) -> None:  # noqa: B027 (most have nothing to say)
        """Raises ValueError if the sampler is not defined under a schedule."""

    @abstractmethod
    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        """Returns x_s.

        Arguments:
            denoiser: For methods that ask it again within the step.
            state: The state at time t, with E[x_0 | x_t].
            s: The next time, 0 <= s < t, float64, of shape ().
            noise: Draws normal noise.
        """

    def refine(self, schedule: Schedule, state: State) -> State:
        """Returns a better state at the same time, once its own estimate is known."""
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
            t_start: The time to start from, in (0, 1].
            generator: Where the noise comes from; keyed streams make each sample independent of
                the batch that it is computed in.
            callback: Called with a `State` before every step and at the end.
            adjust: Changes x_s after every step, given the state before it and x_s.

        Raises:
            ValueError: If the sampler is not defined under the denoiser's schedule, or computes
                x_t anew after `adjust` has changed it.
            SamplingError: If the state stops being finite; names the step.
        """
        schedule = denoiser.schedule
        self.check(schedule)
        if adjust is not None and not self.adjustable:
            raise ValueError(
                f"{type(self).__name__} would undo what this method changes after every step; "
                "choose another sampler: ancestral, euler_maruyama, ddim"
            )
        if self.clip:
            denoiser = Clipped(denoiser)
        state, x_t, times = None, start, self.times(schedule, t_start)
        finite, every = list[Tensor](), 1 if start.device.type == "cpu" else ASKED
        for k, (t, s) in enumerate(pairwise(times)):
            denoised, share = denoiser.with_share(x_t, t)
            state = State(float(t), x_t, denoised, _shortened(state, self.memory), share)
            state = self.refine(schedule, state)
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
        """Raises SamplingError if one of the states after the steps up to `step` was not."""
        if all(finite):
            return
        k = step - len(finite) + finite.index(False)
        raise SamplingError(
            f"{type(self).__name__}: x_t is not finite after step {k + 1} of {self.steps} "
            f"(from t={float(times[k]):.6g} to {float(times[k + 1]):.6g}); is the denoiser "
            "trained at this level? Otherwise take more steps, another grid, or clip=true"
        )


def _shortened(state: State | None, length: int) -> State | None:
    """The newest `length` states; older ones are let go."""
    if state is None or length == 0:
        return None
    return replace(state, previous=_shortened(state.previous, length - 1))
