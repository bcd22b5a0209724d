r"""ILVR: iterative latent variable refinement, the low frequencies are those of a reference.

After every step of a sampler, from t to s, what the operator sees of x_s is exchanged for what it
sees of the reference at the same noise level,

    x_s <- x_s - A⁺ A x_s + A⁺ (α_s y + σ_s A z).

For the paper's operator, downsampling, A⁺ A is a low-pass filter φ and A⁺ y the reference φ(y).
The noise of the observation is not counted: y is taken for A x_0, and unless the exchange ends
early, A x_0 = y at the end, noise included, and A⁺ multiplies that noise by 1 / s where A = U S Vᵀ
has a small s: a blur is refused. For a noisy y take `Replacement`.

Source:
    Choi et al., "ILVR: conditioning method for denoising diffusion probabilistic models", 2021,
    algorithm 1.
"""

__all__ = ["ILVR"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.time_travel import Travelling
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler

LARGEST_CONDITION = 100.0  # largest over smallest s > 0; bicubic reduction has 2, blurs 1000s


class ILVR(Guidance):
    """Exchanges what a linear operator sees, after every step of a sampler; σ_y is not used.

    One call of the network for each step of the sampler.

    Arguments:
        until: The time in [0, 1) down to which x_s is changed; 0 for all steps. A later end leaves
            more to the prior.

    Raises:
        ValueError: If `until` is outside [0, 1).
    """

    requires = "svd"
    noiseless = True
    isotropic = False

    def __init__(self, until: float = 0.0) -> None:
        if not 0 <= until < 1:
            raise ValueError(f"until={until} is not allowed; it is a time in [0, 1)")
        self.until = until

    def check(self, observation: Observation) -> None:
        super().check(observation)
        s = observation.svd.singular_values
        condition = float(s.max() / s[s > 0].min())
        if condition > LARGEST_CONDITION:
            raise ValueError(
                f"ILVR puts A⁺ y in place of what {type(observation.operator).__name__} sees, and "
                f"its A⁺ multiplies noise by up to {condition:.3g}; use guidance=replacement, "
                "which knows the noise"
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

        def refine(x: Tensor, s: Tensor, noise: Noise) -> Tensor:
            if s < self.until:
                return x
            alpha_s, sigma_s = (c.to(x, non_blocking=True) for c in schedule(s))
            seen = alpha_s * observation.y + operator(sigma_s * noise(x) - x)
            return x + operator.pseudo_inverse(seen)

        method = Travelling(sampler, schedule, change=refine)
        start = observation.start(schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)
