"""Sources of the observations that are restored: test images, files, pairs of the prior."""

__all__ = ["GivenObservation", "ObservationSource", "ObservedImages", "PriorPairs"]

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.operator import Operator
from diffusion_lab.operator.noise_model import Noise
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.task.prior_pairs import sample_prior_pairs


class ObservationSource(ABC):
    """Clean images x_0 and their observations y, by number."""

    @abstractmethod
    def __call__(self, index: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns x_0, or None if it is unknown, and y.

        Arguments:
            index: Numbers of the images, int64, of shape (G,), on the device of the result.
        """


class ObservedImages(ObservationSource):
    """y = A(x_0) + noise of given images.

    Arguments:
        read: Returns x_0 of shape (G, C, H, W) for the numbers of a group.
        operator: The operator A.
        noise: The noise model.
        seed: Seed of the noise.
    """

    def __init__(
        self, read: Callable[[Tensor], Tensor], operator: Operator, noise: Noise, seed: int
    ) -> None:
        self.read, self.operator, self.noise, self.seed = read, operator, noise, seed

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = self.read(index)
        generator = KeyedGenerator(make_key(self.seed, "observation", index))
        return x_0, self.noise.draw(self.operator(x_0), generator)


class GivenObservation(ObservationSource):
    """One observation whose clean image is unknown.

    Arguments:
        y: The observation, of shape (1, *).
    """

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def __call__(self, index: Tensor) -> tuple[None, Tensor]:
        return None, self.y.to(index.device)


class PriorPairs(ObservationSource):
    """x_0 and y = x_t / α_t from the prior's own reverse chain, see `sample_prior_pairs`.

    Arguments:
        denoiser: The prior.
        shape: The shape of one image.
        t: The time t in (0, 1].
        seed: Seed of the draws.
    """

    def __init__(self, denoiser: Denoiser, shape: tuple[int, ...], t: float, seed: int) -> None:
        self.denoiser, self.shape, self.t, self.seed = denoiser, shape, t, seed

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x_t, x_0 = sample_prior_pairs(
            self.denoiser, self.shape, self.t, self.seed, index, clip=True
        )
        alpha_t, _ = self.denoiser.schedule(torch.tensor(self.t, dtype=torch.float64))
        return x_0, x_t / alpha_t.to(x_t)
