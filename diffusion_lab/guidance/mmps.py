r"""MMPS: both moments of x_0 given x_t, by Tweedie's formulas.

    p(y | x_t) = N(y; A x̂, Σ_y + A V Aᵀ),    V = Cov[x_0 | x_t] = σ_t² / α_t J,
    E[x_0 | x_t, y] = x̂ + V Aᵀ (Σ_y + A V Aᵀ)⁻¹ (y - A x̂),

where the dependence of V on x_t is left out of the gradient. V is never formed: a product with it
is a backward pass, and the system is solved by GMRES. It is exact for any Gaussian prior, once as
many iterations are through as y has numbers.

The Jacobian of a network is neither symmetric nor positive where it has learned badly, at high
noise. There a few iterations are safer than many, since they cannot follow what a nearly singular
system asks for: on a small trained network three kept all samples near the data, eight did not.

Source:
    Rozet, Andry, Lanusse, Louppe, "Learning diffusion priors from observations by expectation
    maximization", 2024, section 4.2 (moment matching posterior sampling).
"""

__all__ = ["MMPS"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.guidance.jacobian import denoised_and_vjp
from diffusion_lab.guidance.linear_solve import gmres


class MMPS(Guided):
    """One call of the denoiser and k + 1 backward passes a step.

    Arguments:
        iterations: The number k of GMRES iterations, at least 1.

    Raises:
        ValueError: If k is below 1.
    """

    requires = "linear"
    noiseless = True
    isotropic = False

    def __init__(self, iterations: int = 3) -> None:
        if iterations < 1:
            raise ValueError(f"iterations={iterations} is not allowed; it is at least 1")
        self.iterations = iterations

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return _MMPS(denoiser, observation, self.iterations)


class _MMPS(Conditional):
    def __init__(self, denoiser: Denoiser, observation: Observation, iterations: int) -> None:
        super().__init__(denoiser, observation)
        self.iterations = iterations

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoised, vjp = denoised_and_vjp(self.denoiser, x_t, t)
        scale, a = self.scale(x_t, t), self.linear

        def pull(v: Tensor) -> Tensor:
            """V Aᵀ v."""
            return scale * vjp(a.adjoint(v))

        v = gmres(
            lambda v: self.sigma_y**2 * v + a(pull(v)), self.y - a(denoised), self.iterations
        )
        return denoised + pull(v)
