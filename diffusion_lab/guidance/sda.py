r"""SDA: the likelihood of score-based data assimilation, for any differentiable operator.

    p(y | x_t) = N(y; A(x̂), (σ_y² + γ r_t²) I),    r_t = σ_t / α_t,
    E[x_0 | x_t, y] = x̂ + σ_t² / α_t Jᵀ A'(x̂)ᵀ (y - A(x̂)) / (σ_y² + γ r_t²),

x̂ = E[x_0 | x_t], J = ∂x̂ / ∂x_t, A' the derivative of A. γ stands for what is uncertain of A(x_0)
given x_t, in units of r_t². A small γ finds the right mode of a mixture and makes the reverse
process stiff, up to 1 / γ times. Langevin corrections at every level (sampler=predictor_corrector)
take away what its steps miss.

A process too stiff for its steps runs off to infinity. At small σ_y that takes steps in log SNR
(sampler/grid=log_snr) that are about as small as γ, and snr² <= γ for the corrections: γ = 0.03
was stable with 64 steps and snr = 0.16 down to σ_y = 0.01, γ = 0.01 down to 0.05. Without noise
the last estimate would overshoot 1 / γ times, so σ_y = 0 is refused.

Detached, the noise ε̂ is held fixed, so that x̂ = (x_t - σ_t ε̂) / α_t has J = I / α_t: no backward
pass through the network, and

    E[x_0 | x_t, y] = x̂ + r_t² / (σ_y² + γ r_t²) A'(x̂)ᵀ (y - A(x̂)).

Source:
    Rozet, Louppe, "Score-based data assimilation", 2023, section 3.2.
"""

__all__ = ["SDA"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.guidance.jacobian import denoised_and_vjp
from diffusion_lab.tensor import broadcast


class SDA(Guided):
    """One call of the denoiser and one backward pass for each score.

    Arguments:
        gamma: γ, above 0: 0.01 to 0.03 in the authors' code.
        detach: Whether the network's derivative is left out. 1 / γ is then the largest factor of
            Aᵀ (y - A x̂): γ is about |A|² or more, not 0.03.

    Raises:
        ValueError: If γ is not above 0.
    """

    isotropic = False

    def __init__(self, gamma: float = 0.03, detach: bool = False) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma={gamma} is not allowed; γ is above 0")
        self.gamma = gamma
        self.detach = detach

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return _SDA(denoiser, observation, self.gamma, self.detach)


class _SDA(Conditional):
    def __init__(
        self, denoiser: Denoiser, observation: Observation, gamma: float, detach: bool
    ) -> None:
        super().__init__(denoiser, observation)
        self.gamma, self.detach = gamma, detach

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        ratio = self.schedule.ratio(t)
        if self.detach:
            denoised = self.denoiser(x_t, t)
        else:
            denoised, vjp = denoised_and_vjp(self.denoiser, x_t, t)
        with torch.enable_grad():
            x = denoised.detach().requires_grad_()
            prediction = self.operator(x)
        y = self.y.detach()
        variance = self.sigma_y**2 + self.gamma * broadcast(ratio, y) ** 2
        pulled = torch.autograd.grad(prediction, x, (y - prediction.detach()) / variance)[0]
        if self.detach:
            return denoised + broadcast(ratio, x_t) ** 2 * pulled
        return denoised + self.scale(x_t, t) * vjp(pulled)
