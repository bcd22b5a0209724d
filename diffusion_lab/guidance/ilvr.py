r"""ILVR: iterative latent variable refinement, with the low frequencies of a reference.

After every step of a sampler, from t to s, the observed part of x_s is replaced by that of the
reference at the same noise level,

    x_s <- x_s - A⁺ A x_s + A⁺ (α_s y + σ_s A z).

For the paper's operator, downsampling, A⁺ A is a low-pass filter φ and A⁺ y the reference φ(y).
The method ignores the noise of the observation: unless the replacement ends early, A x_0 = y at
the end, including the noise of y, and A⁺ multiplies that noise by 1 / s where A = U S Vᵀ has a
small s. Blurs are therefore refused. Use `Replacement` for a noisy y.

Source:
    Choi et al., "ILVR: conditioning method for denoising diffusion probabilistic models", 2021,
    algorithm 1.
"""

__all__ = ["ILVR"]

from typing import Annotated

from torch import Tensor

from diffusion_lab.constraints import Range, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.time_travel import TimeTravelSampler
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler

Time = Annotated[float, Range(0, 1, high_open=True)]
MAX_CONDITION = 100.0  # largest over smallest s > 0: 2 for bicubic reduction, 1000s for blurs


class ILVR(Guidance):
    """Replaces the observed part of x_s after every step of a sampler; σ_y is not used.

    Arguments:
        t_stop: The last time at which x_s is changed; 0 changes it after all steps. A larger value
            gives the prior more influence.
    """

    requires = "svd"
    allows_noiseless = True
    requires_scalar_noise = False
    denoising_problem = "all of x_s is replaced by y, and the samples are y itself"

    @checked
    def __init__(self, t_stop: Time = 0.0) -> None:
        self.t_stop = t_stop

    def check(self, observation: Observation) -> None:
        super().check(observation)
        s = observation.svd.singular_values
        condition = float(s.max() / s[s > 0].min())
        if condition > MAX_CONDITION:
            raise ValueError(
                f"ILVR ignores the noise of y, and A⁺ of {type(observation.operator).__name__} "
                f"multiplies noise by up to {condition:.3g}; use guidance=replacement, which "
                "accounts for the noise"
            )

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        operator, schedule = observation.svd, denoiser.schedule

        def replace(x: Tensor, s: Tensor, noise: Noise) -> Tensor:
            if s < self.t_stop:
                return x
            alpha_s, sigma_s = (c.to(x, non_blocking=True) for c in schedule(s))
            target = alpha_s * observation.y + operator(sigma_s * noise(x) - x)
            return x + operator.pseudo_inverse(target)

        method = TimeTravelSampler(sampler, schedule, change=replace)
        start = observation.start(schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)
