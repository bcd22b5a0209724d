r"""SDA: the likelihood of score-based data assimilation, for any differentiable operator.

    p(y | x_t) = N(y; A(x̂), (σ_y² + γ r_t²) I),    r_t = σ_t / α_t,
    E[x_0 | x_t, y] = x̂ + σ_t² / α_t Jᵀ A'(x̂)ᵀ (y - A(x̂)) / (σ_y² + γ r_t²),

x̂ = E[x_0 | x_t], J = ∂x̂ / ∂x_t, A' the derivative of A. γ r_t² models the variance of A(x_0)
given x_t. A small γ finds the right mode of a mixture and makes the reverse process stiff, up to
1 / γ times. Langevin corrections at every level (sampler=predictor_corrector) reduce the error of
the steps.

A process that is too stiff for its steps diverges. At small σ_y, stability needs steps in log SNR
(sampler/grid=log_snr) of about the size γ / |A|², and snr² <= γ for the corrections. Measured on
seven problems with 64 steps and snr = 0.16, where five observe single elements (three mixtures, a
Gaussian, a spring), one is a blur, and one the sum of 16 elements, with |A| = 4:

| γ | σ_y = 0.05 | σ_y = 0.01 |
|---|---|---|
| 0.03 | stable, except for the sum | stable for single elements; blur: residuals of 16 σ_y |
| 0.01 | stable for mixtures and the spring only | diverges on all |

Without noise the last estimate would overshoot 1 / γ times, so that σ_y = 0 is refused.

With `detach`, the noise estimate ε̂ is held fixed, so that x̂ = (x_t - σ_t ε̂) / α_t has J = I / α_t.
There is then no backward pass through the network, and

    E[x_0 | x_t, y] = x̂ + r_t² / (σ_y² + γ r_t²) A'(x̂)ᵀ (y - A(x̂)).

Source:
    Rozet, Louppe, "Score-based data assimilation", 2023, section 3.2.
"""

__all__ = ["SDA"]

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.jacobian import tweedie_moments
from diffusion_lab.tensor import broadcast


class SDA(Guided):
    """SDA: one call of the denoiser and one backward pass per score.

    Arguments:
        gamma: γ: 0.01 to 0.03 in the authors' code.
        detach: Whether to ignore the derivative of the network. 1 / γ is then the largest factor
            of Aᵀ (y - A x̂), so that γ should be about |A|² or more, not 0.03.
    """

    requires_scalar_noise = False

    @checked
    def __init__(self, gamma: Positive = 0.03, detach: bool = False) -> None:
        self.gamma = gamma
        self.detach = detach

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        ratio = denoiser.schedule.ratio(t)
        if self.detach:
            denoised: Tensor = denoiser(x_t, t)
        else:
            denoised, covariance = tweedie_moments(denoiser, x_t, t)
        with torch.enable_grad():
            x = denoised.detach().requires_grad_()
            prediction = observation.operator(x)
        y = observation.y.detach()
        variance = observation.sigma_y**2 + self.gamma * broadcast(ratio, y) ** 2
        pulled = torch.autograd.grad(prediction, x, (y - prediction.detach()) / variance)[0]
        if self.detach:
            return denoised + broadcast(ratio, x_t) ** 2 * pulled
        return denoised + covariance(pulled)
