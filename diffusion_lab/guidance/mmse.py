r"""Minimum mean squared error estimate E[x_0 | y] of a noisy image, by one call of the denoiser.

With σ_{t*} / α_{t*} = σ_y as in the truncated reverse SDE,

    E[x_0 | y] = E[x_0 | x_{t*} = α_{t*} y].

For an exact posterior, one sample has twice the mean squared error of E[x_0 | y] (3.01 dB lower
PSNR), and the mean of M samples 1 + 1/M times.
"""

__all__ = ["MMSE"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.sampler.base import Callback, Generator, Sampler, State


class MMSE(Guidance):
    """Posterior mean of a noisy image, in the one step of a sampler with steps=1."""

    stochastic = False
    requires = "identity"
    uses_step = False

    def check_sampler(self, sampler: Sampler) -> None:
        """Raises ValueError as `Guidance.check_sampler`, or if the sampler has several steps."""
        super().check_sampler(sampler)
        if sampler.steps != 1:
            raise ValueError(
                f"sampler.steps={sampler.steps} is not used by MMSE, which calls the network "
                "once; set sampler.steps=1"
            )

    def estimate(self, denoiser: Denoiser, observation: Observation) -> Tensor:
        """Returns E[x_0 | y], of shape (B, *).

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            observation: The observation, with A = I.

        Raises:
            ValueError: If A is not I, or if the schedule does not reach σ_y.
        """
        self.check(observation)
        t, x_t = observation.at_matching_level(denoiser.schedule)
        with torch.no_grad():
            denoised: Tensor = denoiser(x_t, torch.tensor(t, dtype=torch.float64))
        return denoised

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        denoised = self.estimate(Clipped(denoiser) if sampler.clip else denoiser, observation)
        if callback is not None:
            t, x_t = observation.at_matching_level(denoiser.schedule)
            callback(State(t, x_t, denoised))
            callback(State(0.0, denoised, denoised))
        return denoised
