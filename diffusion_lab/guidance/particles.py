"""Particles of twisted sequential Monte Carlo; the formulas are those of `tds`."""

__all__ = ["ParticleSet", "systematic", "take"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.guidance.base import Observation
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler.base import Generator


def systematic(log_weights: Tensor, count: int, u: Tensor) -> Tensor:
    """Returns the indices of `count` particles drawn by their weights, ascending, (G, count).

    Particle j is drawn floor or ceil of count w_j times, and count w_j times on average.

    Arguments:
        log_weights: log w_j up to a constant, of shape (G, N).
        count: Number of draws.
        u: One uniform number in [0, 1) for each group, of shape (G,).
    """
    ends = log_weights.double().softmax(1).cumsum(1)
    ends = ends / ends[:, -1:]  # the last is 1 exactly
    places = (u.double()[:, None] + torch.arange(count, device=u.device)) / count
    return torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[1] - 1)


def take(x: Tensor, chosen: Tensor) -> Tensor:
    """Returns the chosen particles, (G, n, *)."""
    return x[torch.arange(len(x), device=x.device)[:, None], chosen]


class ParticleSet:
    """Random numbers of the particles, and their steps in the coefficients of A."""

    def __init__(
        self, observation: Observation, count: int, data_std: float, generator: Generator
    ) -> None:
        self.operator, self.group = observation.svd, observation.group
        self.y = observation.y[:: self.group, None]  # one row a group, (G, 1, *')
        self.sigma_y, self.c = float(observation.sigma_y), data_std**2
        self.a = self.operator.singular_values.to(self.y)
        self.shape = (len(self.y), count, *observation.shape[1:])
        if isinstance(generator, KeyedGenerator):
            first = generator.key[:: self.group]
            each = torch.arange(count, device=first.device)
            keys = make_key(first[:, None], "particle", each).flatten()
            self.each: Generator = KeyedGenerator(keys)
            self.whole: Generator = KeyedGenerator(make_key(first, "group"))
        else:
            self.each = self.whole = generator

    def normal(self, count: int | None = None) -> Tensor:
        """Draws z ~ N(0, I), of shape (G, N, *), or (G, count, *) with count at most N."""
        groups, particles, *shape = self.shape
        if isinstance(self.each, KeyedGenerator):
            z = self.each.normal(*shape, dtype=self.y.dtype).to(self.y.device)
        else:
            device = self.y.device if self.each is None else self.each.device
            z = torch.randn(
                groups * particles, *shape, generator=self.each, dtype=self.y.dtype, device=device
            ).to(self.y.device)
        return z.reshape(groups, particles, *shape)[:, :count]

    def uniform(self) -> Tensor:
        """Draws u ~ U[0, 1) for each group, float64, of shape (G,)."""
        if isinstance(self.whole, KeyedGenerator):
            u = self.whole.uniform(dtype=torch.float64)
        else:
            device = self.y.device if self.whole is None else self.whole.device
            u = torch.rand(len(self.y), generator=self.whole, dtype=torch.float64, device=device)
        return u.reshape(-1).to(self.y.device)

    def _variance(self, r: float) -> float:
        """v at a level."""
        return r**2 * self.c / (r**2 + self.c)

    def _apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Applies a map of the operator to (G, N, *)."""
        y = function(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def _residual(self, denoised: Tensor) -> Tensor:
        """e = Uᵀ (y - A x̂), (G, N, *)."""
        return self._apply(self.operator.ut, self.y - self._apply(self.operator, denoised))

    def twist(self, denoised: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """log ψ up to a constant, (G, N), and diag(a / (σ_y² + v a²)) e in the coefficients."""
        e = self._residual(denoised)
        # Unobserved coefficients are 0 in e and add the same constant to all particles.
        variance = self.sigma_y**2 + self._variance(r) * self.a**2
        log_variance = variance.log().expand(e.shape[2:]).sum()
        log_twist = -(_sum(e**2 / variance) + log_variance) / 2
        return log_twist, self.a / variance * e

    def move(
        self, z: Tensor, denoised: Tensor, pull: Tensor, r: float, s: float
    ) -> tuple[Tensor, Tensor]:
        """z' of the proposal, and log (p(z' | z) / proposal), (G, N)."""
        q, j = s**2 / r**2, self.c / (s**2 + self.c)
        tau2 = s**2 * (1 - q) + (1 - q) ** 2 * self._variance(r)
        total = self.sigma_y**2 + (self._variance(s) + j**2 * tau2) * self.a**2
        f = 1 - tau2 * j**2 * self.a**2 / total
        # White noise stays white under the rotation.
        noise = self._apply(self.operator.vt, self.normal())
        f = f.expand(noise.shape[2:])
        jump = tau2 * j * pull + (tau2 * f).sqrt() * noise
        ratio = (_sum(noise**2 - jump**2 / tau2) + f.log().sum()) / 2
        return q * z + (1 - q) * denoised + self._apply(self.operator.v, jump), ratio

    def last(self, denoised: Tensor, r: float) -> Tensor:
        """Draws x_0 given z_N and y under N(x̂, v I), (G, n, *)."""
        v = self._variance(r)
        total = self.sigma_y**2 + v * self.a**2
        noise = self._apply(self.operator.vt, self.normal(denoised.shape[1]))
        step = v * self.a / total * self._residual(denoised)
        spread = (v * self.sigma_y**2 / total).sqrt().expand(noise.shape[2:])
        return denoised + self._apply(self.operator.v, step + spread * noise)


def _sum(x: Tensor) -> Tensor:
    """The sum over all but particles, (G, N), in float64: weights are small differences."""
    return x.flatten(2).sum(2, dtype=torch.float64)
