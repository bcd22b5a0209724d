r"""Time travel of RePaint: repeated segments of the steps of a sampler.

After every j steps, x is noised again by j steps, x_t = α_t / α_s x_s + √v z, and the steps are
repeated, r passes over each segment in total.

Source:
    Lugmayr et al., "RePaint: inpainting using denoising diffusion probabilistic models", 2022,
    algorithm 1.
"""

__all__ = ["TimeTravelSampler"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegative, PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition

Change = Callable[[Tensor, Tensor, Noise], Tensor]  # x_s, s and noise -> x_s


class TimeTravelSampler(Sampler):
    """The steps of another sampler, with a change after each and with jumps to higher noise.

    Its grid has N + (r - 1) j ⌊(N - 1) / j⌋ steps for N steps of the other sampler, fewer if
    segments are too low to be repeated. Where the next time is not lower, the step goes to the
    next lower level and jumps from there.

    Arguments:
        sampler: The other sampler.
        schedule: The schedule of the denoiser that the sampler will be called with.
        repeats: The number r of passes over each segment.
        jump: The length j of a segment in steps.
        change: Changes x_s after every step.
        lowest: The ratio σ / α of the lowest level at which the first step of a repeated segment
            may end.

    Raises:
        ValueError: If the steps of the sampler cannot be changed or repeated.
    """

    @checked
    def __init__(
        self,
        sampler: Sampler,
        schedule: Schedule,
        repeats: PositiveInt = 1,
        jump: PositiveInt = 1,
        change: Change | None = None,
        lowest: NonNegative = 0.0,
    ) -> None:
        name = type(sampler).__name__
        if not sampler.supports_adjust:
            raise ValueError(
                f"{name} overwrites what this method changes after every step; "
                "choose another sampler: ancestral, euler_maruyama, ddim"
            )
        if repeats > 1 and sampler.history:
            raise ValueError(
                f"{name} uses earlier steps, which repeats={repeats} repeats; set "
                "guidance.repeats=1 or choose another sampler: ancestral, euler_maruyama, ddim"
            )
        self.ladder = sampler.times(schedule)
        repeatable = schedule.ratio(self.ladder) >= lowest
        path = _path(sampler.steps, repeats, jump, repeatable.tolist())
        super().__init__(len(path) - 1, sampler.grid, sampler.clip)
        self.sampler, self.change = sampler, change
        self.path = self.ladder[path]

    def check(self, schedule: Schedule) -> None:
        self.sampler.check(schedule)

    def times(self, schedule: Schedule, t_start: float = 1.0) -> Tensor:
        return self.path

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        below = self.ladder[self.ladder < state.t][0]
        x = self.sampler.step(denoiser, state, below, noise)
        if self.change is not None:
            x = self.change(x, below, noise)
        if s <= below:
            return x
        step = transition(denoiser.schedule, s, below)  # forward: from `below` to s
        return step.alpha_t / step.alpha_s * x + torch.sqrt(step.variance) * noise(x)


def _path(steps: int, repeats: int, jump: int, repeatable: list[bool]) -> list[int]:
    """The indices of the grid from which a step is made, in order, and the last index.

    A segment is repeated if its first step ends at a repeatable index.
    """
    path: list[int] = []
    for k in range(steps):
        path.append(k)
        # As in the paper, there is no jump from x_0; segments are counted from the step to it.
        whole = jump <= k + 1 < steps and (steps - 2 - k) % jump == 0
        if whole and repeatable[k + 2 - jump]:
            path += list(range(k + 1 - jump, k + 1)) * (repeats - 1)
    return [*path, steps]
