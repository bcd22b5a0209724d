r"""Replacement, and RePaint: what was observed of x_s is overwritten with the observation.

After every step of a sampler, from t to s, the coefficients that y knows better than the noise
level r_s = σ_s / α_s are replaced by the noisy version of y, one coefficient i of A = U S Vᵀ at a
time,

    c_i <- α_s ȳ_i + √(σ_s² - α_s² ν_i²) z_i    where r_s >= ν_i = σ_y / s_i,    ȳ = S⁺ Uᵀ y,

which is N(α_s c_i, σ_s²) given x_0, also if y is noisy: y's own noise is counted once. Without
noise, ν = 0, A x_0 = y in the end; for a mask this is the projection of Song et al.

The rest of the image learns of y only through the next calls of the network. RePaint gives it
time: after every j steps x is noised again by as many, x_t = α_t / α_s x_s + √v z, and the steps
are repeated, until each stretch was walked r times.

It is an approximation also with an exact denoiser: on a prior of several modes the weights of the
modes stay near the prior's.

Sources:
    Song et al., "Score-based generative modeling through SDEs", 2021, appendix I.2 (imputation).
    Lugmayr et al., "RePaint: inpainting using denoising diffusion probabilistic models", 2022,
    algorithm 1.
"""

__all__ = ["Replacement", "Travelling", "check_travel"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.ddrm import Spectrum
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State, transition
from diffusion_lab.schedule import Schedule

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
        if not sampler.adjustable:
            raise ValueError(
                f"{name} would undo what this method changes after every step; "
                "choose another sampler: ancestral, euler_maruyama, ddim"
            )
        if repeats > 1 and sampler.memory:
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
        alpha_below, _, alpha_s, _, v = transition(denoiser.schedule, s, below)
        return (alpha_s / alpha_below).to(x) * x + torch.sqrt(v).to(x) * noise(x)


class Replacement(Guidance):
    """Overwrites what was observed, after every step of a sampler.

    One call of the network for each step of the path, of which there are
    N + (r - 1) j ⌊(N - 1) / j⌋ with a sampler of N steps.

    Arguments:
        repeats: RePaint's r, how often each stretch of steps is walked, at least 1; 1 is plain
            replacement.
        jump: RePaint's j, the length of a stretch in steps, at least 1.

    Raises:
        ValueError: If r or j is below 1.
    """

    requires = "linear"
    noiseless = True

    def __init__(self, repeats: int = 1, jump: int = 1) -> None:
        check_travel(repeats, jump)
        self.repeats, self.jump = repeats, jump

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        spectrum, operator = Spectrum.of(observation), observation.operator
        schedule = denoiser.schedule

        def replace(x: Tensor, s: Tensor, noise: Noise) -> Tensor:
            alpha_s, sigma_s = (c.to(x) for c in schedule(s))
            c, z = operator.vt(x), operator.vt(noise(x))
            return operator.v(spectrum.replaced(c, z, alpha_s, sigma_s))

        method = Travelling(sampler, schedule, self.repeats, self.jump, replace)
        start = observation.start(schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)


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
