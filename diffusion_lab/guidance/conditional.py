"""The denoisers that guided methods make: a denoiser that has seen y."""

__all__ = ["Conditional"]

from typing import cast

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Observation
from diffusion_lab.operator import LinearOperator
from diffusion_lab.tensor import broadcast


class Conditional(Denoiser):
    """x_t, t -> E[x_0 | x_t, y], approximately, on rows that belong to y's.

    Arguments:
        denoiser: The prior, E[x_0 | x_t].
        observation: What was seen.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser
        self.y, self.operator = observation.y, observation.operator
        self.sigma_y = observation.sigma_y

    @property
    def linear(self) -> LinearOperator:
        """A, for methods that require a linear one."""
        return cast(LinearOperator, self.operator)

    def scale(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns σ_t² / α_t: E[x_0 | x_t, y] = x̂ + σ_t² / α_t ∇ log p(y | x_t)."""
        return broadcast(self.schedule(t.double())[1] * self.schedule.ratio(t), x_t)
