r"""What a network predicts, and how its output becomes E[x_0 | x_t].

All are one thing seen from different sides: with x_t = α_t x_0 + σ_t ε,

    ε̂ = (x_t - α_t x̂) / σ_t,    score = ∇ log p(x_t) = -ε̂ / σ_t,    x̂ = E[x_0 | x_t].

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 12 (ε).
    Efron, "Tweedie's formula and selection bias", 2011 (the score and E[x_0 | x_t]).
"""

__all__ = ["Epsilon"]

from torch import Tensor, nn


class Epsilon(nn.Module):
    """The network predicts the noise ε (DDPM)."""

    def target(self, x_0: Tensor, epsilon: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns what the network should say of x_t = α_t x_0 + σ_t ε: ε, of shape (B, *)."""
        return epsilon

    def denoised(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns x̂ = (x_t - σ_t ε̂) / α_t from the network's output ε̂, of shape (B, *)."""
        return (x_t - sigma_t * output) / alpha_t
