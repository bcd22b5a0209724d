r"""DAPS: decoupled annealing, each level starts afresh from a draw of the clean image.

At each level t, of ratio r_t = σ_t / α_t, three things happen,

    x̂ = the end of the probability-flow ODE from x_t, a few steps of it,
    x_0 ~ N(x̂, r_t² I) p(y | x_0),    up to a factor,
    x_s = α_s x_0 + σ_s z.

The levels are coupled by nothing but x_0, so that an error made at one can be mended at the next.
N(x̂, r_t² I) stands for p(x_0 | x_t), and is wider: on a Gaussian prior the samples spread too far.

For a linear operator A = U S Vᵀ the draw is exact. With c = Vᵀ x̂, ȳ = S⁺ Uᵀ y, ν_i = σ_y / s_i,

    c_i <- c_i + (ȳ_i - c_i) / (1 + ν_i² / r_t²) + r_t / √(1 + r_t² / ν_i²) z_i.

For any other it is K steps of Langevin dynamics from x̂,

    x <- x - h ∇U(x) + √(2 h) z,    U(x) = ‖x - x̂‖² / (2 r_t²) + ‖y - A(x)‖² / (2 σ_y²),

with h a share of the smaller scale, 1 / (1 / r_t² + 1 / σ_y²), which is stable for |∂A| <= 1.

Source:
    Zhang et al., "Improving diffusion inverse problem solving with decoupled noise annealing",
    2025, algorithm 1. (The published code has ‖y - A(x)‖² / τ² with a τ of 0.01 for any σ_y.)
"""

__all__ = ["DAPS", "Coupled", "Coupling", "DAPSSampler", "misfit_gradient"]

import math

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.ddrm import Spectrum
from diffusion_lab.operator import LinearOperator
from diffusion_lab.sampler import DDIM
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State, transition
from diffusion_lab.sampler.grid import Karras
from diffusion_lab.schedule import LARGEST


def misfit_gradient(observation: Observation, x: Tensor) -> Tensor:
    """Returns ∇ ½ ‖y - A(x)‖², of shape (B, *)."""
    operator, y = observation.operator, observation.y
    if isinstance(operator, LinearOperator):
        return operator.transpose(operator(x) - y)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        misfit = (operator(x) - y).square().sum() / 2  # rows do not meet in the gradient
    return torch.autograd.grad(misfit, x)[0]


class Coupling:
    """Draws x ~ N(x; x̂, ρ² I) N(y; A(x), σ_y² I): exactly for linear operators, else by Langevin.

    Arguments:
        observation: y, A and σ_y; σ_y = 0 only for a linear A.
        steps: K, the number of Langevin steps.
        size: h as a share of 1 / (1 / ρ² + 1 / σ_y²).
    """

    def __init__(self, observation: Observation, steps: int, size: float) -> None:
        self.observation, self.steps, self.size = observation, steps, size
        linear = isinstance(observation.operator, LinearOperator)
        self.spectrum = Spectrum.of(observation) if linear else None

    def __call__(self, centre: Tensor, rho: float, noise: Noise) -> Tensor:
        """Returns x, of shape (B, *).

        Arguments:
            centre: x̂, of shape (B, *).
            rho: ρ, above 0.
            noise: Draws normal noise.
        """
        if self.spectrum is None:
            return self._langevin(centre, rho, noise)
        operator, nu = self.spectrum.operator, self.spectrum.nu
        mean = self.spectrum.pulled(operator.vt(centre), rho)
        std = rho / torch.sqrt(1 + (rho / nu) ** 2)  # 0 where ν = 0, ρ where it is infinite
        return operator.v(mean + std * operator.vt(noise(centre)))

    def _langevin(self, centre: Tensor, rho: float, noise: Noise) -> Tensor:
        precision = 1 / float(self.observation.sigma_y) ** 2
        h, x = self.size / (1 / rho**2 + precision), centre
        for _ in range(self.steps):
            slope = (x - centre) / rho**2 + precision * misfit_gradient(self.observation, x)
            x = x - h * slope + math.sqrt(2 * h) * noise(x)
        return x


class Coupled(Guidance):
    """A method that splits the prior from the observation, and couples them by a `Coupling`.

    Arguments:
        langevin_steps: K, the number of Langevin steps of a draw, at least 1; for operators that
            are not linear.
        step_size: Their size in (0, 2), as a share of 1 / (1 / ρ² + 1 / σ_y²). The variance of
            what y sees is too large by about half of it; the smaller, the more steps are needed.

    Raises:
        ValueError: If a setting is outside its range.
    """

    noiseless = True

    def __init__(self, langevin_steps: int = 100, step_size: float = 0.1) -> None:
        if langevin_steps < 1:
            raise ValueError(f"langevin_steps={langevin_steps} is not allowed; it is at least 1")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size={step_size} is not allowed; it lies in (0, 2)")
        self.langevin_steps, self.step_size = langevin_steps, step_size

    def check(self, observation: Observation) -> None:
        super().check(observation)
        operator = observation.operator
        if not isinstance(operator, LinearOperator) and not bool(observation.sigma_y > 0):
            raise ValueError(
                f"sigma_y={observation.sigma_y}: {type(self).__name__} divides by it where "
                f"{type(operator).__name__} is not linear; set sigma_y above 0, for example "
                "sigma_y=0.01"
            )

    def coupling(self, observation: Observation) -> Coupling:
        """Returns the draw of x given x̂, ρ and y."""
        return Coupling(observation, self.langevin_steps, self.step_size)


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
        alpha_s, sigma_s, alpha_t, sigma_t, _ = transition(schedule, state.t, s)
        # The solver's own loop would call the denoiser once more at x_t.
        inner = state
        for u in self.ode.times(schedule, state.t)[1:]:
            x_u = self.ode.step(denoiser, inner, u, noise)
            inner = State(float(u), x_u, denoiser(x_u, u) if u > 0 else x_u)
        # From pure noise on, r_t is any large number: x_s would be far off its level for nothing.
        x_0 = self.coupling(inner.x_t, min(float(sigma_t / alpha_t), LARGEST), noise)
        return alpha_s.to(x_0) * x_0 + sigma_s.to(x_0) * noise(x_0)


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
