r"""Replacement, and RePaint: what was observed of x_s is overwritten with the observation.

After every step of a sampler, from t to s, the coefficients that y knows better than the noise
level r_s = σ_s / α_s are replaced by the noisy version of y, one coefficient i of A = U S Vᵀ at a
time,

    c_i <- α_s ȳ_i + √(σ_s² - α_s² ν_i²) z_i    where r_s >= ν_i = σ_y / s_i,    ȳ = S⁺ Uᵀ y,

which is N(α_s c_i, σ_s²) given x_0, also if y is noisy: y's own noise is counted once. Without
noise, ν = 0, A x_0 = y in the end; for a mask this is the projection of Song et al.

The rest of the image learns of y only through the next calls of the network. RePaint gives it
time: after every j steps x is noised again by as many, x_t = α_t / α_s x_s + √v z, and the steps
are repeated, until each stretch was walked r times.

It is an approximation also with an exact denoiser: on a prior of several modes the weights of the
modes stay near the prior's.

Sources:
    Song et al., "Score-based generative modeling through SDEs", 2021, appendix I.2 (imputation).
    Lugmayr et al., "RePaint: inpainting using denoising diffusion probabilistic models", 2022,
    algorithm 1.
"""

__all__ = ["Replacement"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.guidance.time_travel import Travelling, check_travel
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler


class Replacement(Guidance):
    """Overwrites what was observed, after every step of a sampler.

    One call of the network for each step of the path, of which there are
    N + (r - 1) j ⌊(N - 1) / j⌋ with a sampler of N steps.

    Arguments:
        repeats: RePaint's r, how often each stretch of steps is walked, at least 1; 1 is plain
            replacement.
        jump: RePaint's j, the length of a stretch in steps, at least 1.

    Raises:
        ValueError: If r or j is below 1.
    """

    requires = "svd"
    noiseless = True

    def __init__(self, repeats: int = 1, jump: int = 1) -> None:
        check_travel(repeats, jump)
        self.repeats, self.jump = repeats, jump

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        spectrum, operator = Spectrum.of(observation), observation.svd
        schedule = denoiser.schedule

        def replace(x: Tensor, s: Tensor, noise: Noise) -> Tensor:
            alpha_s, sigma_s = (c.to(x, non_blocking=True) for c in schedule(s))
            c, z = operator.vt(x), operator.vt(noise(x))
            return operator.v(spectrum.replaced(c, z, alpha_s, sigma_s))

        method = Travelling(sampler, schedule, self.repeats, self.jump, replace)
        start = observation.start(schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)
