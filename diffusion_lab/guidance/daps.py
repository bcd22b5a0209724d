r"""DAPS: decoupled annealing, each level starts afresh from a draw of the clean image.

At each level t, of ratio r_t = σ_t / α_t, three things happen,

    x̂ = the end of the probability-flow ODE from x_t, a few steps of it,
    x_0 ~ N(x̂, r_t² I) p(y | x_0),    up to a factor,
    x_s = α_s x_0 + σ_s z.

The levels are coupled by nothing but x_0, so that an error made at one can be mended at the next.
N(x̂, r_t² I) stands for p(x_0 | x_t), and is wider: on a Gaussian prior the samples spread too far.

How x_0 is drawn: see `Coupling`.

Source:
    Zhang et al., "Improving diffusion inverse problem solving with decoupled noise annealing",
    2025, algorithm 1. (The published code has ‖y - A(x)‖² / τ² with a τ of 0.01 for any σ_y.)
"""

__all__ = ["DAPS", "DAPSSampler"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Observation
from diffusion_lab.guidance.data_step import Coupled, Coupling
from diffusion_lab.sampler import DDIM
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.sampler.time_grid import Karras
from diffusion_lab.schedule.base import MAX_RATIO
from diffusion_lab.transition import transition


class DAPSSampler(Sampler):
    """The levels of `DAPS`.

    Arguments:
        like: The sampler whose number of steps, grid and clipping are taken.
        coupling: Draws x_0 given x̂ and y.
        ode: Solves the probability-flow ODE.
    """

    def __init__(self, like: Sampler, coupling: Coupling, ode: Sampler) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.coupling, self.ode = coupling, ode

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        schedule = denoiser.schedule
        step = transition(schedule, state.t, s)
        # The solver's own loop would call the denoiser once more at x_t.
        inner = state
        for u in self.ode.times(schedule, state.t)[1:]:
            x_u = self.ode.step(denoiser, inner, u, noise)
            inner = State(float(u), x_u, denoiser(x_u, u) if u > 0 else x_u)
        # From pure noise on, r_t is any large number: x_s would be far off its level for nothing.
        x_0 = self.coupling(inner.x_t, min(float(step.sigma_t / step.alpha_t), MAX_RATIO), noise)
        return step.alpha_s * x_0 + step.sigma_s * noise(x_0)


class DAPS(Coupled):
    """Draws x_0 around the end of the ODE at each level, and noises it to the next.

    The sampler gives the levels (its number of steps and its grid) and the clipping; its own step
    is not used. The ODE is solved by Euler's method in σ / α (DDIM) on Karras et al.'s grid.
    `ode_steps` calls of the network a level; K gradients of an operator that is not linear.

    Arguments:
        ode_steps: The number of steps of the ODE from each level, at least 1; 1 takes x̂ for
            E[x_0 | x_t].
        langevin_steps: See `Coupled`.
        step_size: See `Coupled`.

    Raises:
        ValueError: If a setting is outside its range.
    """

    def __init__(
        self, ode_steps: int = 5, langevin_steps: int = 100, step_size: float = 0.1
    ) -> None:
        super().__init__(langevin_steps, step_size)
        if ode_steps < 1:
            raise ValueError(f"ode_steps={ode_steps} is not allowed; it is at least 1")
        self.ode_steps = ode_steps

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        ode = DDIM(self.ode_steps, grid=Karras())
        method = DAPSSampler(sampler, self.coupling(observation), ode)
        start = observation.start(denoiser.schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)
