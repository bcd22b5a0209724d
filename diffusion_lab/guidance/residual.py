r"""The residual rule of the talk: ancestral sampling with a pull towards the observation.

    x_{t-1} = 1/√a_t (x_t - β_t / √(1 - ᾱ_t) ε̂) + s_t z + λ (y - x_t),    s_t² = β̃_t or β_t,

a_t = 1 - β_t, from noise at T, z = 0 at the last step, y on the scale of x_0. It is a baseline:
λ (y - x_t) is a likelihood step as if y were x_t plus noise of a precision that λ makes up, the
same at all times. The result is not a sample of p(x_0 | y) for any λ: with a small one the spread
of the samples is far too large, with a large one far too small.
"""

__all__ = ["Residual"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.sampler.base import Callback, Generator, Sampler

STARTS = ("noise", "y")


class Residual(Guidance):
    """Adds λ (y - x_t) to every step of the sampler.

    With `Ancestral` as the sampler this is the rule above; a step from t to any earlier s takes
    √a = α_t / α_s. If the sampler clips x̂, ε̂ is that of the clipped one: on a schedule that ends
    in pure noise the rule diverges without, since the first step divides ε̂'s error by a tiny √a.

    Arguments:
        strength: The strength λ of the pull, at least 0.
        start: "noise" starts from the prior at t = 1; "y" from α_t y at y's own noise level.

    Raises:
        ValueError: If λ is negative or `start` is unknown.
    """

    requires = "identity"
    noiseless = True

    def __init__(self, strength: float = 0.05, start: str = "noise") -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength} is not allowed; λ is at least 0")
        if start not in STARTS:
            raise ValueError(f"start={start!r} is unknown; choose noise or y")
        self.strength = strength
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
            t_start, x_t = observation.at_own_level(schedule)
        else:
            t_start, x_t = 1.0, observation.start(schedule, generator)
        return sampler(
            denoiser, x_t, t_start=t_start, generator=generator, callback=callback,
            adjust=lambda state, x_s: x_s + self.strength * (y - state.x_t),
        )  # fmt: skip
