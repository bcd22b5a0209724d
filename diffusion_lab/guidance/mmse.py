r"""The estimate of least mean squared error, E[x_0 | y]: one call of the denoiser.

With σ_{t*} / α_{t*} = σ_y as in the truncated reverse SDE,

    E[x_0 | y] = E[x_0 | x_{t*} = α_{t*} y].

For an exact posterior, one sample has twice its mean squared error (3.01 dB less PSNR), and the
mean of M samples 1 + 1/M times.
"""

__all__ = ["MMSE"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.sampler.base import Callback, Generator, Sampler, State


class MMSE(Guidance):
    """Returns the posterior mean; the sampler is not used."""

    stochastic = False
    requires = "identity"

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        t, x_t = observation.at_own_level(denoiser.schedule)
        denoised = denoiser(x_t, torch.tensor(t, dtype=torch.float64))
        if callback is not None:
            callback(State(t, x_t, denoised))
            callback(State(0.0, denoised, denoised))
        return denoised
