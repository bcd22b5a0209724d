r"""Noise models: how an observation y is drawn given A(x_0), and what methods take it for.

Posterior methods speak of Gaussian noise, y = A(x_0) + σ_y n; of any other noise they get the
standard deviation, a number for each of y's.
"""

__all__ = ["Gaussian", "Noise", "Poisson", "poisson_quantile"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, normal_like

STEPS = 1000  # a bound that no search for a quantile reaches


class Noise(ABC):
    """The distribution of y given A(x_0)."""

    @abstractmethod
    def draw(
        self, clean: Tensor, generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        """Draws y, of the shape and type of A(x_0).

        Arguments:
            clean: A(x_0), of shape (B, *').
            generator: See `normal_like`; with keyed streams y is a function of clean and the keys.
        """

    @abstractmethod
    def std(self, y: Tensor) -> float | Tensor:
        """Returns σ_y: one number, or one for each of y's, estimated from y."""


class Gaussian(Noise):
    """y = A(x_0) + σ_y n, n ~ N(0, I).

    Arguments:
        sigma_y: σ_y, on the scale of y, at least 0.

    Raises:
        ValueError: If σ_y is negative or not finite.
    """

    def __init__(self, sigma_y: float = 0.05) -> None:
        if not 0 <= sigma_y < float("inf"):
            raise ValueError(f"sigma_y={sigma_y} is not allowed; it is at least 0 and finite")
        self.sigma_y = sigma_y

    def draw(
        self, clean: Tensor, generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        return clean + self.sigma_y * normal_like(clean, generator)

    def std(self, y: Tensor) -> float:
        return self.sigma_y


def poisson_quantile(z: Tensor, mean: Tensor) -> Tensor:
    """Returns the count at the same quantile as z: the least k with P(K <= k) > Φ(z).

    For z ~ N(0, 1) it is a draw of K ~ Poisson(λ), exact but for the rounding of Φ in float64. The
    search starts at the Cornish-Fisher expansion λ + z √λ + (z² - 1) / 6, mostly one step away.

    Arguments:
        z: A quantile of N(0, 1), float64.
        mean: λ, at least 0, float64, of z's shape.
    """
    quantile = torch.special.ndtr(z)
    k = (mean + z * mean.sqrt() + (z**2 - 1) / 6).round().clamp(min=0)
    for _ in range(STEPS):
        # P(K <= k) = Q(k + 1, λ), the regularised upper incomplete gamma function.
        up = torch.special.gammaincc(k + 1, mean) <= quantile
        down = (k > 0) & (torch.special.gammaincc(k.clamp(min=1), mean) > quantile)
        if not bool((up | down).any()):
            break
        k = k + up.to(k) - (down & ~up).to(k)
    return k


class Poisson(Noise):
    """Shot noise: K ~ Poisson(rate (A(x_0) + 1) / 2) photons, y = 2 K / rate - 1.

    For observations on the scale of [-1, 1], where -1 is dark; below it there are no photons.

    Arguments:
        rate: The mean number of photons at 1 (white), above 0. The fewer, the noisier.

    Raises:
        ValueError: If the rate is out of its range.
    """

    def __init__(self, rate: float = 255.0) -> None:
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate={rate} is not allowed; it is above 0 and finite")
        self.rate = rate

    def draw(
        self, clean: Tensor, generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        mean = self.rate * (clean.double() + 1).clamp(min=0) / 2
        count = poisson_quantile(normal_like(mean, generator), mean)
        return (2 * count / self.rate - 1).to(clean)

    def std(self, y: Tensor) -> Tensor:
        """Returns 2 √K / rate, the deviation of K being √λ ~ √K; at least that of one photon."""
        count = self.rate * (y + 1) / 2
        return 2 / self.rate * count.clamp(min=1).sqrt()
