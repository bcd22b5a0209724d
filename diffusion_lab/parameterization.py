r"""Parameterizations: the prediction target of a network, and E[x_0 | x_t] from its output.

All targets are equivalent: with x_t = α_t x_0 + σ_t ε,

    ε̂ = (x_t - α_t x̂) / σ_t,    score = ∇ log p(x_t) = -ε̂ / σ_t,    x̂ = E[x_0 | x_t].

Every output o is linear in x̂ for a given x_t. Its slope |∂o / ∂x̂|, the gain, relates the squared
errors: |o - o*|² = gain² |x̂ - x_0|².

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 12 (ε).
    Efron, "Tweedie's formula and selection bias", 2011 (the score and E[x_0 | x_t]).
    Salimans, Ho, "Progressive distillation", 2022, appendix D (x_0 and v).
    Song et al., "Score-based generative modeling through SDEs", 2021, eq. 7 (score).
    Karras et al., "Elucidating the design space", 2022, table 1 and eq. 7 (EDM).
    Liu, Gong, Liu, "Flow straight and fast", 2022, eq. 1 (flow).
"""

__all__ = ["EDM", "X0", "Epsilon", "Flow", "Parameterization", "Score", "V"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lab.constraints import Positive, checked
from diffusion_lab.schedule import Schedule


class Parameterization(nn.Module, ABC):
    """The relation between a network's output and E[x_0 | x_t].

    All methods take α_t and σ_t in shapes that broadcast against x_t of shape (B, *).
    """

    @abstractmethod
    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns the target of the output at x_t = α_t x_0 + σ_t ε, of shape (B, *)."""

    @abstractmethod
    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns x̂ = E[x_0 | x_t] from the network's output, of shape (B, *)."""

    @abstractmethod
    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns |∂ output / ∂ x̂|."""

    def input_scale(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns the factor of x_t in the network's input, for a variance of about one."""
        return torch.rsqrt(alpha_t**2 + sigma_t**2)

    def scales_input(self, schedule: Schedule) -> bool:
        """Returns whether `input_scale` differs from 1 under a schedule."""
        return not schedule.variance_preserving


class Epsilon(Parameterization):
    """The network predicts the noise ε (DDPM)."""

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return epsilon

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (x_t - sigma_t * output) / alpha_t

    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return alpha_t / sigma_t


class Score(Parameterization):
    """The network predicts the score in units of 1 / σ_t: σ_t ∇ log p(x_t) = -ε̂."""

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return -epsilon

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (x_t + sigma_t * output) / alpha_t

    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return alpha_t / sigma_t


class X0(Parameterization):
    """The network predicts the clean state x_0."""

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return x_0

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return output

    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return torch.ones_like(alpha_t)


class V(Parameterization):
    """The network predicts v = (α_t ε - σ_t x_0) / √(α_t² + σ_t²), well conditioned at all levels.

    For a variance-preserving schedule the root is 1 and x̂ = α_t x_t - σ_t v.
    """

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (alpha_t * epsilon - sigma_t * x_0) * self.input_scale(alpha_t, sigma_t)

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        scale = self.input_scale(alpha_t, sigma_t)
        return scale * (alpha_t * scale * x_t - sigma_t * output)

    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return 1 / (sigma_t * self.input_scale(alpha_t, sigma_t))


class Flow(Parameterization):
    """The network predicts the velocity ε - x_0 of the straight path from x_0 to ε."""

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return epsilon - x_0

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (x_t - sigma_t * output) / (alpha_t + sigma_t)

    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (alpha_t + sigma_t) / sigma_t


class EDM(Parameterization):
    r"""EDM preconditioning: input and target have unit variance at every level.

    With r = σ_t / α_t and the network F,

        x̂ = c_skip x_t / α_t + c_out F(c_in x_t / α_t),    c_skip = σ_d² / (r² + σ_d²),
        c_out = r σ_d / √(r² + σ_d²),    c_in = 1 / √(r² + σ_d²).

    Arguments:
        sigma_data: σ_d, the standard deviation of x_0.
    """

    @checked
    def __init__(self, sigma_data: Positive = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def _c(self, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip / α_t and c_out, which stay finite for a small α_t."""
        total = sigma_t**2 + (alpha_t * self.sigma_data) ** 2  # α_t² (r² + σ_d²)
        return alpha_t * self.sigma_data**2 / total, sigma_t * self.sigma_data * torch.rsqrt(total)

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        skip, out = self._c(alpha_t, sigma_t)
        return (x_0 - skip * (alpha_t * x_0 + sigma_t * epsilon)) / out

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        skip, out = self._c(alpha_t, sigma_t)
        return skip * x_t + out * output

    def gain(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return 1 / self._c(alpha_t, sigma_t)[1]

    def scales_input(self, schedule: Schedule) -> bool:
        return True

    def input_scale(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return torch.rsqrt(sigma_t**2 + (alpha_t * self.sigma_data) ** 2)
