r"""Truncated reverse SDE: an exact posterior sampler for Gaussian noise on the whole image.

The observation is a point of the forward process. With t* such that σ_{t*} / α_{t*} = σ_y,

    α_{t*} y = α_{t*} x_0 + σ_{t*} n

has the distribution of x_{t*} given x_0, so that p(x_0 | y) = p(x_0 | x_{t*} = α_{t*} y): the
reverse SDE from α_{t*} y at t*, instead of from noise at 1, samples the posterior. The only
approximations are the score and the discretization. A deterministic sampler gives a single point
instead: the reverse ODE maps one y to one image.
"""

__all__ = ["TruncatedReverseSDE"]

import logging

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.sampler.base import Callback, Generator, Sampler

log = logging.getLogger(__name__)


class TruncatedReverseSDE(Guidance):
    """Runs the sampler from the noise level of the observation."""

    requires = "identity"

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        if not sampler.stochastic:
            log.warning(
                "%s without noise gives one image for each observation, not a posterior; "
                "use sampler=euler_maruyama, sampler=ancestral, or eta=1 (between 0 and 1 the "
                "spread is too small)",
                type(sampler).__name__,
            )
        t, start = observation.at_matching_level(denoiser.schedule)
        return sampler(denoiser, start, t_start=t, generator=generator, callback=callback)
