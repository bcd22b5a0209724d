r"""Time travel: another sampler's steps, changed after each, and repeated.

After every j steps x is noised again by as many, x_t = α_t / α_s x_s + √v z, and they are made
anew, until each stretch was walked r times.

Source:
    Lugmayr et al., "RePaint: inpainting using denoising diffusion probabilistic models", 2022,
    algorithm 1.
"""

__all__ = ["Travelling", "check_travel"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition

Change = Callable[[Tensor, Tensor, Noise], Tensor]  # x_s, s and noise -> x_s


class Travelling(Sampler):
    """Another sampler's steps, with a change after each, and with jumps back into the noise.

    Its grid has N + (r - 1) j ⌊(N - 1) / j⌋ steps, N those of the other sampler; a step after
    which the next time is not lower is one to the next lower level and a jump from there.

    Arguments:
        sampler: The other sampler.
        schedule: The schedule that it will be used under.
        repeats: r, how often each stretch is walked, at least 1.
        jump: The length j of a stretch in steps, at least 1.
        change: Changes x_s after every step.

    Raises:
        ValueError: If r or j is below 1, or the sampler's steps cannot be changed or repeated.
    """

    def __init__(
        self, sampler: Sampler, schedule: Schedule, repeats: int = 1, jump: int = 1,
        change: Change | None = None,
    ) -> None:  # fmt: skip
        check_travel(repeats, jump)
        name = type(sampler).__name__
        if not sampler.supports_adjust:
            raise ValueError(
                f"{name} would undo what this method changes after every step; "
                "choose another sampler: ancestral, euler_maruyama, ddim"
            )
        if repeats > 1 and sampler.history:
            raise ValueError(
                f"{name} looks back at earlier steps, which repeats={repeats} walks anew; set "
                "guidance.repeats=1 or choose another sampler: ancestral, euler_maruyama, ddim"
            )
        path = _path(sampler.steps, repeats, jump)
        super().__init__(len(path) - 1, sampler.grid, sampler.clip)
        self.sampler, self.change = sampler, change
        self.ladder = sampler.times(schedule)
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


def check_travel(repeats: int, jump: int) -> None:
    """Raises ValueError unless r and j are both at least 1."""
    if repeats < 1 or jump < 1:
        raise ValueError(f"repeats={repeats} and jump={jump} are not allowed; both are at least 1")


def _path(steps: int, repeats: int, jump: int) -> list[int]:
    """The places on the grid from which a step is made, in order, and the end."""
    path = []
    for k in range(steps):
        path.append(k)
        # As in the paper there is no jump from x_0; the stretches are counted from the step to it.
        if jump <= k + 1 < steps and (steps - 2 - k) % jump == 0:
            path += list(range(k + 1 - jump, k + 1)) * (repeats - 1)
    return [*path, steps]
