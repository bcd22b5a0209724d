r"""DAPS: decoupled annealing posterior sampling.

Each level t, of ratio r_t = σ_t / α_t, has three steps,

    x̂ = end of the probability-flow ODE from x_t, solved in a few steps,
    x_0 ~ N(x̂, r_t² I) p(y | x_0)    up to normalization,
    x_s = α_s x_0 + σ_s z.

Successive levels depend on each other through x_0 only, so that later levels can correct earlier
errors. N(x̂, r_t² I) approximates p(x_0 | x_t) and is wider: on a Gaussian prior the samples spread
too much.

See `LikelihoodStep` for the second step.

Source:
    Zhang et al., "Improving diffusion inverse problem solving with decoupled noise annealing",
    2025, algorithm 1. (The published code has ‖y - A(x)‖² / τ² with τ = 0.01 for any σ_y.)
"""

__all__ = ["DAPS"]

from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import CustomStep, Observation
from diffusion_lab.guidance.data_step import LikelihoodStep, StepSize
from diffusion_lab.sampler import DDIM
from diffusion_lab.sampler.base import Noise, State
from diffusion_lab.sampler.time_grid import Karras
from diffusion_lab.schedule.base import MAX_RATIO
from diffusion_lab.transition import transition


class DAPS(LikelihoodStep, CustomStep):
    """DAPS: `ode_steps` calls of the network per level; K gradients of a nonlinear operator.

    The ODE is solved by Euler's method in σ / α (DDIM) on the grid of Karras et al.

    Arguments:
        ode_steps: The number of steps of the ODE from each level; with 1, x̂ = E[x_0 | x_t].
        langevin_steps: See `LikelihoodStep`.
        step_size: See `LikelihoodStep`.
    """

    @checked
    def __init__(
        self,
        ode_steps: PositiveInt = 5,
        langevin_steps: PositiveInt = 100,
        step_size: StepSize = 0.1,
    ) -> None:
        super().__init__(langevin_steps, step_size)
        self.ode_steps = ode_steps
        self.ode = DDIM(ode_steps, grid=Karras())

    def step(
        self,
        denoiser: Denoiser,
        observation: Observation,
        state: State,
        s: Tensor,
        noise: Noise,
    ) -> Tensor:
        schedule = denoiser.schedule
        step = transition(schedule, state.t, s)
        # The solver is not called: the sampler has already called the denoiser at x_t.
        inner = state
        for u in self.ode.times(schedule, state.t)[1:]:
            x_u = self.ode.step(denoiser, inner, u, noise)
            inner = State(float(u), x_u, denoiser(x_u, u) if u > 0 else x_u)
        # From pure noise, r_t may be so large that x_s is rounded off its noise level.
        rho = min(float(step.sigma_t / step.alpha_t), MAX_RATIO)
        x_0 = self.likelihood_step(observation, inner.x_t, rho, noise)
        return step.alpha_s * x_0 + step.sigma_s * noise(x_0)
