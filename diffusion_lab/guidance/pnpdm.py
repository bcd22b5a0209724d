r"""PnP-DM: split Gibbs sampling, alternating between the prior and the likelihood.

A copy z of x, coupled to x by a Gaussian of width ρ, splits the posterior,

    π_ρ(x, z) ∝ p(x) N(x; z, ρ² I) p(y | z),    π_ρ(x) -> p(x | y) for ρ -> 0.

Gibbs sampling alternates

    z ~ N(z; x, ρ² I) p(y | z):  exact for a linear operator, otherwise Langevin dynamics
                                 (see `LikelihoodStep`),
    x ~ p(x) N(z; x, ρ² I):      denoising of z with noise ρ, by the reverse SDE from α_{t*} z at
                                 the time t* with σ_{t*} / α_{t*} = ρ (see `truncated`),

with ρ_k = max(ρ_max a^k, ρ_min) for k = 0, 1, ..., K - 1. Successive iterates are more correlated
for small ρ, so that a chain hardly ever changes its mode once ρ is small. Each sample is the last
x of its own chain.

Errors of the draw of x accumulate along the chain. The sampler must be fully stochastic (DDIM with
η < 1 makes the samples spread too little), and the small variance needs more steps than
Euler-Maruyama.

Sources:
    Vono, Dobigeon, Chainais, "Split-and-augmented Gibbs sampler", 2019.
    Wu et al., "Principled probabilistic imaging using diffusion models as plug-and-play priors",
    2024, algorithm 1.
"""

__all__ = ["PnPDM"]

import logging

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, PositiveInt, PositiveUnit, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.guidance.base import Observation
from diffusion_lab.guidance.data_step import LikelihoodStep, StepSize
from diffusion_lab.rng import normal_like
from diffusion_lab.sampler.base import Callback, Generator, Sampler, State

log = logging.getLogger(__name__)


class PnPDM(LikelihoodStep):
    """PnP-DM: one Gibbs chain per sample; the sampler draws x given z.

    Each iteration makes as many calls of the network as the sampler does. The callback gets the
    start of every iteration.

    Arguments:
        iterations: The length K of the chain.
        rho_max: The first ρ, within the schedule's range of σ / α.
        rho_min: The last ρ, at most `rho_max`; the posterior is smoothed by this width.
        decay: The factor a of ρ from one iteration to the next.
        langevin_steps: See `LikelihoodStep`.
        step_size: See `LikelihoodStep`.

    Raises:
        ValueError: If `rho_min` exceeds `rho_max`, or if `rho_max` is outside the schedule.
        SamplingError: If the state becomes non-finite; names the iteration.
    """

    @checked
    def __init__(
        self,
        iterations: PositiveInt = 100,
        rho_max: Positive = 10.0,
        rho_min: Positive = 0.3,
        decay: PositiveUnit = 0.9,
        langevin_steps: PositiveInt = 100,
        step_size: StepSize = 0.1,
    ) -> None:
        super().__init__(langevin_steps, step_size)
        if rho_min > rho_max:
            raise ValueError(
                f"rho_min={rho_min} and rho_max={rho_max} are not allowed; rho_min must be at "
                "most rho_max"
            )
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
        schedule = denoiser.schedule
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
            z = self.likelihood_step(observation, x, rho, lambda x: normal_like(x, generator))
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
    """Passes on only the first state of a run of the sampler."""
    states: list[State] = []

    def once(state: State) -> None:
        if not states:
            states.append(state)
            callback(state)

    return once
