r"""Noise models: the distribution of the observation y given A(x_0).

Posterior methods assume Gaussian noise, y = A(x_0) + σ_y n. Other noise is approximated by a
Gaussian with the same standard deviation, one number for each element of y.
"""

__all__ = ["Gaussian", "Noise", "Poisson", "poisson_quantile"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegative, Positive, checked
from diffusion_lab.rng import KeyedGenerator, normal_like

MAX_STEPS = 1000  # bound on the search for a quantile; never reached in practice


class Noise(ABC):
    """The distribution of y given A(x_0)."""

    @abstractmethod
    def draw(
        self, clean: Tensor, generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        """Draws y, with the shape and dtype of A(x_0).

        Arguments:
            clean: A(x_0), of shape (B, *').
            generator: See `normal_like`.
        """

    @abstractmethod
    def std(self, y: Tensor) -> float | Tensor:
        """Returns σ_y, estimated from y: one number, or one for each element of y."""


class Gaussian(Noise):
    """y = A(x_0) + σ_y n, n ~ N(0, I).

    Arguments:
        sigma_y: σ_y, on the scale of y.
    """

    @checked
    def __init__(self, sigma_y: NonNegative = 0.05) -> None:
        self.sigma_y = sigma_y

    def draw(
        self, clean: Tensor, generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        return clean + self.sigma_y * normal_like(clean, generator)

    def std(self, y: Tensor) -> float:
        return self.sigma_y


def poisson_quantile(z: Tensor, mean: Tensor) -> Tensor:
    """Returns the smallest k with P(K <= k) > Φ(z) for K ~ Poisson(λ).

    For z ~ N(0, 1) it is a draw of K, exact up to the rounding of Φ in float64. The search starts
    at the Cornish-Fisher expansion λ + z √λ + (z² - 1) / 6, which is mostly one step away.

    Arguments:
        z: A quantile of N(0, 1), float64.
        mean: λ, non-negative, float64, of z's shape.
    """
    quantile = torch.special.ndtr(z)
    k = (mean + z * mean.sqrt() + (z**2 - 1) / 6).round().clamp(min=0)
    for _ in range(MAX_STEPS):
        # P(K <= k) = Q(k + 1, λ), the regularised upper incomplete gamma function.
        up = torch.special.gammaincc(k + 1, mean) <= quantile
        down = (k > 0) & (torch.special.gammaincc(k.clamp(min=1), mean) > quantile)
        if not bool((up | down).any()):
            break
        k = k + up.to(k) - (down & ~up).to(k)
    return k


class Poisson(Noise):
    """Shot noise: K ~ Poisson(rate (A(x_0) + 1) / 2) photons, y = 2 K / rate - 1.

    For measurements in [-1, 1], where -1 is black; lower values give no photons.

    Arguments:
        rate: The mean number of photons of a white pixel, A(x_0) = 1.
    """

    @checked
    def __init__(self, rate: Positive = 255.0) -> None:
        self.rate = rate

    def draw(
        self, clean: Tensor, generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        mean = self.rate * (clean.double() + 1).clamp(min=0) / 2
        count = poisson_quantile(normal_like(mean, generator), mean)
        return (2 * count / self.rate - 1).to(clean)

    def std(self, y: Tensor) -> Tensor:
        """Returns 2 √K / rate, since the standard deviation of K is √λ ≈ √K; K counts as >= 1."""
        count = self.rate * (y + 1) / 2
        return 2 / self.rate * count.clamp(min=1).sqrt()
