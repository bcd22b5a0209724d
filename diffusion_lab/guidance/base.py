r"""Base classes of posterior methods, which sample p(x_0 | y) given y = A(x_0) + σ_y n.

Most methods run a reverse process with the score of the posterior,

    dx = [f x - g² (∇ log p(x) + ∇ log p(y | x))] dt + g dw̄.

In terms of denoisers, ∇ log p(x_t | y) = (α_t E[x_0 | x_t, y] - x_t) / σ_t² and so

    E[x_0 | x_t, y] = E[x_0 | x_t] + σ_t² / α_t ∇ log p(y | x_t).

Such a method is a `Guided`: it maps the prior's denoiser to one of the posterior, and any sampler
applies. Methods differ in their approximation of p(y | x_t). A `CustomStep` replaces the step of
the sampler instead.

Source:
    Song et al., "Score-based generative modeling through SDEs", 2021, eq. 14.
"""

__all__ = ["ConditionalDenoiser", "CustomStep", "Guidance", "Guided", "Observation"]

import inspect
import logging
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.observation import Observation
from diffusion_lab.operator import Identity, LinearOperator, SVDOperator
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.schedule import Schedule

log = logging.getLogger(__name__)


class Guidance(ABC):
    """Samples from (or estimates a point of) the posterior p(x_0 | y).

    Attributes:
        stochastic: Whether repeated calls give different results.
        requires: The operators that the method is defined for: the identity, those with a singular
            value decomposition (`SVDOperator`), linear ones (`LinearOperator`), any.
        allows_noiseless: Whether σ_y = 0 is allowed.
        requires_scalar_noise: Whether σ_y has to be one number.
        share_particles: Whether the samples of one y come from common particles, so that the rows
            of a group must stay together.
        uses_step: Whether the method uses the step of the sampler. If not, it uses only its number
            of steps, its grid and whether it clips.
        denoising_problem: The reason why the method does not sample the posterior of a noisy image
            (A = I), for a warning; empty if there is none.
    """

    stochastic = True
    requires: Literal["identity", "svd", "linear", "any"] = "any"
    allows_noiseless = False
    requires_scalar_noise = True
    share_particles = False
    uses_step = True
    denoising_problem = ""

    def check(self, observation: Observation) -> None:
        """Raises ValueError if the method is not defined for an observation."""
        name, operator = type(self).__name__, type(observation.operator).__name__
        if self.requires == "identity" and not isinstance(observation.operator, Identity):
            raise ValueError(
                f"{name} is for a noisy image (task=denoise), not for {operator}; choose another "
                "guidance: mmps, pigdm, dps"
            )
        needs_linear = self.requires in ("linear", "svd")
        if needs_linear and not isinstance(observation.operator, LinearOperator):
            raise ValueError(
                f"{name} is for linear operators, and {operator} is not linear; choose another "
                "guidance: dps, daps, sda"
            )
        if self.requires == "svd" and not isinstance(observation.operator, SVDOperator):
            raise ValueError(
                f"{name} needs the singular value decomposition of the operator, and {operator} "
                "has none; choose another guidance: mmps, pigdm, dps"
            )
        sigma_y = observation.sigma_y
        if self.requires_scalar_noise and isinstance(sigma_y, Tensor) and sigma_y.numel() > 1:
            raise ValueError(
                f"{name} is for noise of one standard deviation; choose another guidance: mmps, "
                "sda, dps"
            )
        if not self.allows_noiseless and not bool(torch.as_tensor(sigma_y > 0).all()):
            raise ValueError(
                f"sigma_y=0: {name} divides by it; set sigma_y above 0, for example "
                "sigma_y=0.01, or choose another guidance: ddnm, replacement"
            )

    def check_sampler(self, sampler: Sampler) -> None:
        """Raises ValueError if an argument of the sampler is set that the method does not use."""
        if self.uses_step:
            return
        name = type(self).__name__
        for key, parameter in inspect.signature(type(sampler)).parameters.items():
            value = getattr(sampler, key, parameter.default)
            if key in ("steps", "grid", "clip") or value == parameter.default:
                continue
            if isinstance(value, bool | int | float | str):
                own = f"; {name} has its own guidance.{key}" if hasattr(self, key) else ""
                raise ValueError(
                    f"sampler.{key}={value} is not used by {name}, which uses only steps, grid "
                    f"and clip of the sampler; remove it{own}"
                )

    def __call__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        *,
        generator: Generator = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Returns one sample for each row of the observation, of shape (B, *).

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            sampler: Solves the reverse process.
            observation: The observation; repeat the rows of y for several samples of one.
            generator: The source of the noise, see `Sampler`.
            callback: See `Sampler`.

        Raises:
            ValueError: If the method is not defined for such an observation, or does not use an
                argument that is set in the sampler.
        """
        self.check(observation)
        self.check_sampler(sampler)
        if self.denoising_problem and isinstance(observation.operator, Identity):
            log.warning(
                "%s is not for a noisy image: %s. Choose another guidance for denoising: "
                "truncated, fused, tds",
                type(self).__name__, self.denoising_problem,
            )  # fmt: skip
        with torch.no_grad():
            return self.draw(denoiser, sampler, observation, generator, callback)

    @abstractmethod
    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        """Implements `__call__`, under `torch.no_grad`; see there."""


class Guided(Guidance):
    """Method that replaces E[x_0 | x_t] by E[x_0 | x_t, y], in any sampler.

    A subclass implements `posterior_mean`. One that computes something once per observation may
    override `denoiser` instead.
    """

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Returns the method's approximation of E[x_0 | x_t, y], of shape (B, *).

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            observation: The observation, whose rows correspond to those of x_t.
            x_t: The noisy state, of shape (B, *).
            t: Its time, of shape () or (B,).
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement posterior_mean")

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        """Returns the denoiser x_t, t -> E[x_0 | x_t, y].

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            observation: The observation.
        """
        return ConditionalDenoiser(self, denoiser, observation)

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        start = observation.start(denoiser.schedule, generator)
        posterior = self.denoiser(denoiser, observation)
        return sampler(posterior, start, generator=generator, callback=callback)


class ConditionalDenoiser(Denoiser):
    """The denoiser x_t, t -> E[x_0 | x_t, y] of a `Guided` method.

    Arguments:
        method: The method.
        denoiser: The prior, E[x_0 | x_t].
        observation: The observation.
    """

    def __init__(self, method: Guided, denoiser: Denoiser, observation: Observation) -> None:
        super().__init__(denoiser.schedule)
        self.method, self.denoiser, self.observation = method, denoiser, observation

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.method.posterior_mean(self.denoiser, self.observation, x_t, t)


class CustomStep(Guidance):
    """Method that replaces the step of the sampler."""

    uses_step = False

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        observation: Observation,
        state: State,
        s: Tensor,
        noise: Noise,
    ) -> Tensor:
        """Returns x_s.

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            observation: The observation.
            state: The state at time t, with x̂ = E[x_0 | x_t].
            s: The next time, 0 <= s < t, float64, of shape ().
            noise: Draws normal noise.
        """

    def start(self, denoiser: Denoiser, observation: Observation, generator: Generator) -> Tensor:
        """Returns x_1."""
        return observation.start(denoiser.schedule, generator)

    def make_sampler(
        self, sampler: Sampler, observation: Observation, schedule: Schedule
    ) -> Sampler:
        """Returns the sampler with the steps of this method, and the grid of the given one."""
        return CustomStepSampler(self, sampler, observation)

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        start = self.start(denoiser, observation, generator)
        method = self.make_sampler(sampler, observation, denoiser.schedule)
        return method(denoiser, start, generator=generator, callback=callback)


class CustomStepSampler(Sampler):
    """The loop of a sampler with the step of a `CustomStep` method.

    Arguments:
        method: The method.
        like: The sampler whose number of steps, grid and clipping are taken.
        observation: The observation.
    """

    def __init__(self, method: CustomStep, like: Sampler, observation: Observation) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.method, self.observation = method, observation

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        return self.method.step(denoiser, self.observation, state, s, noise)
