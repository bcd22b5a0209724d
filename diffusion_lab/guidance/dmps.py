r"""DMPS: the likelihood of the noisy image, as if the prior were flat. No backward pass.

Without a prior x_0 given x_t is x_t / α_t with noise of deviation r_t = σ_t / α_t, and

    p(y | x_t) = N(y; A x_t / α_t, σ_y² I + r_t² A Aᵀ),
    E[x_0 | x_t, y] = E[x_0 | x_t] + r_t² Aᵀ (σ_y² I + r_t² A Aᵀ)⁻¹ (y - A x_t / α_t).

For A = I it is the residual rule of the talk put right: the residual is that of x_t / α_t, not of
x_t, and λ follows from the noise levels. Where r_t is not small against the spread of the images
it still claims too little of the prior: the samples spread too widely.

Source:
    Meng, Kabashima, "Diffusion model based posterior sampling for noisy linear inverse problems",
    2022.
"""

__all__ = ["DMPS"]

from copy import copy

from torch import Tensor

from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.guidance.linear_solve import pull_back
from diffusion_lab.sampler.base import Callback, Generator, Sampler
from diffusion_lab.tensor import broadcast


class DMPS(Guided):
    """One call of the denoiser a step, as the prior alone.

    The estimate is as far outside the range of pixels as x_t / α_t is. A sampler that clips clips
    the prior's estimate alone.

    Arguments:
        strength: A factor λ of the likelihood's score, at least 0; 1 is the formula.

    Raises:
        ValueError: If λ is negative.
    """

    requires = "linear"
    noiseless = True

    def __init__(self, strength: float = 1.0) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength} is not allowed; λ is at least 0")
        self.strength = strength

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return _DMPS(denoiser, observation, self.strength)

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        if sampler.clip:
            denoiser, sampler = Clipped(denoiser), copy(sampler)
            sampler.clip = False
        return super().draw(denoiser, sampler, observation, generator, callback)


class _DMPS(Conditional):
    def __init__(self, denoiser: Denoiser, observation: Observation, strength: float) -> None:
        super().__init__(denoiser, observation)
        self.strength = strength

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        variance = self.schedule.ratio(t) ** 2
        alpha_t, _ = self.schedule(t.double())
        e = self.y - self.operator(x_t / broadcast(alpha_t, x_t))
        shift = pull_back(self.linear, e, variance, float(self.sigma_y))
        return self.denoiser(x_t, t) + self.strength * broadcast(variance, x_t) * shift
