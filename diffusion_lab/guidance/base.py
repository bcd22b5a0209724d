r"""What all posterior methods share: y = x_0 + σ_y n goes in, samples of p(x_0 | y) come out."""

__all__ = ["Guidance", "Observation"]

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Callback, Generator, Sampler


@dataclass(frozen=True)
class Observation:
    """A noisy image, y = x_0 + σ_y n with n ~ N(0, I).

    Attributes:
        y: The image, of shape (B, *), on the scale of x_0 in [-1, 1].
        sigma_y: The standard deviation σ_y of the noise, on the same scale; above 0.
    """

    y: Tensor
    sigma_y: float


class Guidance(ABC):
    """Draws from (or estimates a point of) the posterior p(x_0 | y)."""

    stochastic = True  # whether repeated calls give different images

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        *,
        generator: Generator = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Returns one image for each image of the observation, of shape (B, *).

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            sampler: Solves the reverse process.
            observation: What was seen; repeat y to get several samples of it.
            generator: Where the noise comes from, see `Sampler`.
            callback: See `Sampler`.
        """
