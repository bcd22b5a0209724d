r"""DPS: after every step of a sampler, a step down the distance to y.

    x_s = step(x_t) - ζ ∇_{x_t} |y - A(x̂)|,    x̂ = E[x_0 | x_t].

The norm is that of one sample (in some implementations of a batch: then a sample depends on its
neighbours). The slope of a norm does not shrink with the distance, and ζ knows nothing of σ_y: it
is tuned by hand.

The paper's ζ is for 1000 steps. Its sum over the steps is what counts: with so many fewer
steps each one takes so much more, ζ 1000 (t - s) for the step from t to s, or the images come out
unguided.

Source:
    Chung, Kim, McCann, Klasky, Ye, "Diffusion posterior sampling for general noisy inverse
    problems", 2023, algorithm 1.
"""

__all__ = ["DPS"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.sampler.base import Callback, Generator, Sampler, State


class DPS(Guidance):
    noiseless = True
    isotropic = False

    def __init__(self, strength: float = 0.3, steps: int | None = 1000) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength} is not allowed; ζ is at least 0")
        self.strength = strength
        self.steps = steps

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        prior = _Watched(Clipped(denoiser) if sampler.clip else denoiser, observation)
        times = sampler.times(denoiser.schedule)
        if self.steps is None:
            sizes = torch.full_like(times[1:], self.strength)
        else:
            sizes = self.strength * self.steps * (times[:-1] - times[1:])
        sizes = iter(sizes.tolist())

        def adjust(state: State, x_s: Tensor) -> Tensor:
            return x_s - next(sizes) * prior.gradient()

        start = denoiser.schedule.prior_std * observation.noise(generator)
        return sampler(prior, start, generator=generator, callback=callback, adjust=adjust)


class _Watched(Conditional):
    """The prior, with a graph of the first call of each step: the one at x_t."""

    def __init__(self, denoiser: Denoiser, observation: Observation) -> None:
        super().__init__(denoiser, observation)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.seen is not None:
            return self.denoiser(x_t, t)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            denoised = self.denoiser(x_t, t)
            residual = self.y.detach() - self.operator(denoised)
            distance = torch.linalg.vector_norm(residual.flatten(1), dim=1).sum()
        self.seen = x_t, distance
        return denoised.detach()

    def gradient(self) -> Tensor:
        """∇ |y - A(x̂)| at x_t, and the end of the step."""
        x_t, distance = self.seen
        self.seen = None
        return torch.autograd.grad(distance, x_t)[0]
