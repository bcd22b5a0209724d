r"""PnP-DM: a split Gibbs sampler, the prior and the observation in turns.

A copy z of the image, coupled to it by a Gaussian of width ρ, splits the posterior,

    π_ρ(x, z) ∝ p(x) N(x; z, ρ² I) p(y | z),    π_ρ(x) -> p(x | y) for ρ -> 0.

Gibbs sampling draws in turns

    z ~ N(z; x, ρ² I) p(y | z):  exact for a linear operator, else Langevin dynamics (see `daps`),
    x ~ p(x) N(z; x, ρ² I):      denoising z of noise ρ, by the reverse SDE from α_{t*} z at the
                                 time t* with σ_{t*} / α_{t*} = ρ (see `truncated`),

with ρ_k = max(ρ_max a^k, ρ_min) for k = 0, 1, ..., K - 1: large at first, when the chain moves
fast. Two turns are the more alike the smaller ρ is, so that one image's modes are hardly ever
changed once ρ is small. The image is the last x of its own chain.

Errors of the draw of x add up along the chain: the sampler needs all of the noise (DDIM with η < 1
makes the samples spread too little), and the small variance needs more steps than Euler-Maruyama.

Sources:
    Vono, Dobigeon, Chainais, "Split-and-augmented Gibbs sampler", 2019.
    Wu et al., "Principled probabilistic imaging using diffusion models as plug-and-play priors",
    2024, algorithm 1.
"""

__all__ = ["PnPDM"]

import logging

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.guidance.base import Observation
from diffusion_lab.guidance.data_step import Coupled
from diffusion_lab.rng import normal_like
from diffusion_lab.sampler.base import Callback, Generator, Sampler, State

log = logging.getLogger(__name__)


class PnPDM(Coupled):
    """Runs a chain of draws for each image; the sampler draws x given z.

    `iterations` times as many calls of the network as the sampler makes. The callback gets the
    start of every iteration.

    Arguments:
        iterations: The length K of the chain, at least 1.
        rho_max: The first ρ, above 0, within the schedule's range of σ / α.
        rho_min: The last ρ, above 0 and at most `rho_max`; it is the width of what is added to the
            posterior.
        decay: The factor a of ρ from one iteration to the next, in (0, 1].
        langevin_steps: See `Coupled`.
        step_size: See `Coupled`.

    Raises:
        ValueError: If a setting is outside its range, or ρ_max outside the schedule's.
        SamplingError: If the state stops being finite; names the iteration.
    """

    def __init__(
        self, iterations: int = 100, rho_max: float = 10.0, rho_min: float = 0.3,
        decay: float = 0.9, langevin_steps: int = 100, step_size: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__(langevin_steps, step_size)
        if iterations < 1:
            raise ValueError(f"iterations={iterations} is not allowed; it is at least 1")
        if not 0 < rho_min <= rho_max:
            raise ValueError(
                f"rho_min={rho_min} and rho_max={rho_max} are not allowed; 0 < rho_min <= rho_max"
            )
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} is not allowed; it lies in (0, 1]")
        self.iterations, self.decay = iterations, decay
        self.rho_max, self.rho_min = rho_max, rho_min

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        schedule, coupling = denoiser.schedule, self.coupling(observation)
        largest = float(schedule.ratio(1.0))
        if self.rho_max > largest:
            raise ValueError(
                f"rho_max={self.rho_max} is outside the schedule {type(schedule).__name__}, which "
                f"reaches up to σ/α = {largest:.4g}; set guidance.rho_max below that"
            )
        if not sampler.stochastic:
            log.warning(
                "%s without noise does not draw x given z, and the samples spread too little; "
                "use sampler=euler_maruyama, sampler=ancestral, or sampler.eta=1",
                type(sampler).__name__,
            )
        x = torch.zeros_like(observation.noise(generator))
        for k in range(self.iterations):
            rho = max(self.rho_max * self.decay**k, self.rho_min)
            z = coupling(x, rho, lambda x: normal_like(x, generator))
            t = schedule.t_from_ratio(rho)
            start = schedule(t)[0].to(z) * z
            try:
                x = sampler(
                    denoiser, start, t_start=float(t), generator=generator,
                    callback=callback and _first(callback),
                )  # fmt: skip
            except SamplingError as error:
                raise SamplingError(f"iteration {k + 1} of {self.iterations}: {error}") from None
        if callback is not None:
            callback(State(0.0, x, x))
        return x


def _first(callback: Callback) -> Callback:
    """Passes on the first state only: a chain has as many runs of the sampler as iterations."""
    states: list[State] = []

    def once(state: State) -> None:
        if not states:
            states.append(state)
            callback(state)

    return once
