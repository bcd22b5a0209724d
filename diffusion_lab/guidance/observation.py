"""Observations y = A(x_0) + σ_y n, the input of every posterior method."""

__all__ = ["Observation"]

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

from torch import Tensor

from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.operator import Identity, LinearOperator, Operator, SVDOperator
from diffusion_lab.rng import normal_like
from diffusion_lab.sampler.base import Generator
from diffusion_lab.schedule import Schedule


@dataclass(frozen=True)
class Observation:
    """An observation y = A(x_0) + σ_y n with n ~ N(0, I).

    Attributes:
        y: The observations, of shape (B, *').
        sigma_y: The standard deviation σ_y of the noise, in the units of A(x_0); at least 0. A
            tensor that broadcasts against y if the elements of y have different ones.
        operator: A.
        group: Number of consecutive rows with the same y, which are samples of one posterior. It
            divides B.
    """

    y: Tensor
    sigma_y: float | Tensor
    operator: Operator = field(default_factory=Identity)
    group: int = 1

    @property
    def linear(self) -> LinearOperator:
        """A, for methods that require a linear one; `Guidance.check` has refused the others."""
        return cast(LinearOperator, self.operator)

    @property
    def svd(self) -> SVDOperator:
        """A, for methods that require its SVD; `Guidance.check` has refused the others."""
        return cast(SVDOperator, self.operator)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The observation of each coefficient Vᵀ x_0, for A = U S Vᵀ and one σ_y."""
        return Spectrum.of(self.svd, self.y, float(self.sigma_y))

    @cached_property
    def squared_norm(self) -> Tensor:
        """|A|² of a linear A, of shape (B,), see `LinearOperator.squared_norm`."""
        return self.linear.squared_norm(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (B, *) of x_0."""
        return (len(self.y), *(self.operator.shape or self.y.shape[1:]))

    def start(self, schedule: Schedule, generator: Generator) -> Tensor:
        """Draws x_1 ~ N(0, s² I), the start of samplers: `Schedule.prior` in the type of y."""
        return schedule.prior_std * self.noise(generator)

    def at_matching_level(self, schedule: Schedule) -> tuple[float, Tensor]:
        """Returns t* and α_{t*} y, a point of the forward process with σ_{t*} / α_{t*} = σ_y.

        Defined for A = I.

        Raises:
            ValueError: If the schedule does not reach σ_y.
        """
        t = schedule.t_from_ratio(self.sigma_y)
        return float(t), schedule(t)[0].to(self.y) * self.y

    def noise(self, generator: Generator) -> Tensor:
        """Draws z ~ N(0, I), of the shape (B, *) of x_0 and the type of y."""
        return normal_like(self.y.new_empty(()).expand(self.shape), generator)
