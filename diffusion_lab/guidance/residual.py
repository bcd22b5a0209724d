r"""Residual rule of the talk: ancestral sampling plus λ (y - x_t).

    x_{t-1} = 1/√a_t (x_t - β_t / √(1 - ᾱ_t) ε̂) + s_t z + λ (y - x_t),    s_t² = β̃_t or β_t,

a_t = 1 - β_t, from noise at T, z = 0 at the last step, y in the units of x_0. It is a baseline:
λ (y - x_t) is a likelihood step as if y were x_t plus noise of a precision that λ implies, the
same at all times. The result is not a sample of p(x_0 | y) for any λ: the samples spread far too
much for a small λ and far too little for a large one.
"""

__all__ = ["Residual"]

from typing import Literal

from torch import Tensor

from diffusion_lab.constraints import NonNegative, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.sampler.base import Callback, Generator, Sampler


class Residual(Guidance):
    """Adds λ (y - x_t) to every step of the sampler.

    With `Ancestral` as the sampler this is the rule above; a step from t to any earlier s takes
    √a = α_t / α_s. If the sampler clips x̂, ε̂ follows from the clipped x̂; without clipping, the
    rule diverges on a schedule that ends in pure noise, where the first step divides the error of
    ε̂ by a tiny √a.

    Arguments:
        gain: The factor λ of the residual.
        start: "noise" starts from the prior at t = 1; "y" from α_t y at the noise level of y.
    """

    requires = "identity"
    allows_noiseless = True

    @checked
    def __init__(self, gain: NonNegative = 0.05, start: Literal["noise", "y"] = "noise") -> None:
        self.gain = gain
        self.start = start

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        y, schedule = observation.y, denoiser.schedule
        if self.start == "y":
            t_start, x_t = observation.at_matching_level(schedule)
        else:
            t_start, x_t = 1.0, observation.start(schedule, generator)
        return sampler(
            denoiser, x_t, t_start=t_start, generator=generator, callback=callback,
            adjust=lambda state, x_s: x_s + self.gain * (y - state.x_t),
        )  # fmt: skip
