r"""What all posterior methods share: y = A(x_0) + σ_y n goes in, samples of p(x_0 | y) come out.

Most are one and the same reverse process with the score of the posterior,

    dx = [f x - g² (∇ log p(x) + ∇ log p(y | x))] dt + g dw̄.

In terms of denoisers, ∇ log p(x_t | y) = (α_t E[x_0 | x_t, y] - x_t) / σ_t² and so

    E[x_0 | x_t, y] = E[x_0 | x_t] + σ_t² / α_t ∇ log p(y | x_t):

a method is a denoiser made of a denoiser, for any sampler. What differs is how p(y | x_t) is
approximated.

Source:
    Song et al., "Score-based generative modeling through SDEs", 2021, eq. 14.
"""

__all__ = ["Guidance", "Guided", "Observation"]

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.operator import Identity, LinearOperator, Operator, SVDOperator
from diffusion_lab.rng import normal_like
from diffusion_lab.sampler.base import Callback, Generator, Sampler
from diffusion_lab.schedule import Schedule


@dataclass(frozen=True)
class Observation:
    """What was seen, y = A(x_0) + σ_y n with n ~ N(0, I).

    Attributes:
        y: The observations, of shape (B, *').
        sigma_y: The standard deviation σ_y of the noise, on the scale of A(x_0); at least 0. A
            tensor that broadcasts against y if it is not the same for all numbers of y.
        operator: A.
        group: Rows that follow each other and show the same y, so many at a time: samples of one
            posterior. B is a multiple of it.
    """

    y: Tensor
    sigma_y: float | Tensor
    operator: Operator = field(default_factory=Identity)
    group: int = 1

    @property
    def linear(self) -> LinearOperator:
        """A, for methods that require a linear one: `Guidance.check` has refused the others."""
        return cast(LinearOperator, self.operator)

    @property
    def svd(self) -> SVDOperator:
        """A, for methods that require its SVD: `Guidance.check` has refused the others."""
        return cast(SVDOperator, self.operator)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (B, *) of the images x_0."""
        return (len(self.y), *(self.operator.shape or self.y.shape[1:]))

    def start(self, schedule: Schedule, generator: Generator) -> Tensor:
        """Draws x_1 ~ N(0, s² I), from where samplers start, as `Schedule.prior` in y's type."""
        return schedule.prior_std * self.noise(generator)

    def at_own_level(self, schedule: Schedule) -> tuple[float, Tensor]:
        """Returns t* and α_{t*} y, a point of the forward process with σ_{t*} / α_{t*} = σ_y.

        Only of a noisy image, A = I.

        Raises:
            ValueError: If the schedule does not reach σ_y.
        """
        t = schedule.t_from_ratio(self.sigma_y)
        return float(t), schedule(t)[0].to(self.y) * self.y

    def noise(self, generator: Generator) -> Tensor:
        """Draws z ~ N(0, I), of the images' shape (B, *) and y's type."""
        return normal_like(self.y.new_empty(()).expand(self.shape), generator)


class Guidance(ABC):
    """Draws from (or estimates a point of) the posterior p(x_0 | y).

    Attributes:
        stochastic: Whether repeated calls give different images.
        requires: Which operators the method is defined for: the identity, those with a singular
            value decomposition (`SVDOperator`), linear ones (`LinearOperator`), any.
        noiseless: Whether σ_y = 0 is allowed.
        isotropic: Whether σ_y has to be one number.
        shares: Whether the samples of one y come from common particles, so that the rows of a
            group must stay together.
    """

    stochastic = True
    requires: Literal["identity", "svd", "linear", "any"] = "any"
    noiseless = False
    isotropic = True
    shares = False

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
        if self.isotropic and isinstance(sigma_y, Tensor) and sigma_y.numel() > 1:
            raise ValueError(
                f"{name} is for noise of one standard deviation; choose another guidance: mmps, "
                "sda, dps"
            )
        if not self.noiseless and not bool(torch.as_tensor(sigma_y > 0).all()):
            raise ValueError(
                f"sigma_y={sigma_y}: {name} divides by it; set sigma_y above 0, for example "
                "sigma_y=0.01, or choose another guidance: ddnm, replacement"
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
        """Returns one image for each row of the observation, of shape (B, *).

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            sampler: Solves the reverse process.
            observation: What was seen; repeat y to get several samples of it.
            generator: Where the noise comes from, see `Sampler`.
            callback: See `Sampler`.

        Raises:
            ValueError: If the method is not defined for such an observation.
        """
        self.check(observation)
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
        """Does the work of a call, without a graph."""


class Guided(Guidance):
    """A method that is a denoiser: E[x_0 | x_t, y] in place of E[x_0 | x_t], in any sampler."""

    @abstractmethod
    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        """Returns x_t, t -> E[x_0 | x_t, y], approximately, on rows that belong to y's.

        Arguments:
            denoiser: The prior, E[x_0 | x_t].
            observation: What was seen.
        """

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
