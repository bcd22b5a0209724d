r"""ΠGDM: x_0 given x_t as a Gaussian whose variance is that of data with one spread.

Data of variance s² in every direction have Cov[x_0 | x_t] = r̃_t² I, and

    p(y | x_t) = N(y; A x̂, σ_y² I + r̃_t² A Aᵀ),    r̃_t² = r_t² s² / (r_t² + s²),
    E[x_0 | x_t, y] = x̂ + σ_t² / α_t Jᵀ Aᵀ (σ_y² I + r̃_t² A Aᵀ)⁻¹ (y - A x̂),

with x̂ = E[x_0 | x_t], J = ∂x̂ / ∂x_t, r_t = σ_t / α_t. The paper has s = 1. It is exact for
p(x_0) = N(μ, s² I). Without noise the inverse becomes the pseudo-inverse, the paper's A⁺.

Source:
    Song, Vahdat, Mardani, Kautz, "Pseudoinverse-guided diffusion models for inverse problems",
    2023.
"""

__all__ = ["PiGDM"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.guidance.jacobian import denoised_and_vjp
from diffusion_lab.guidance.linear_solve import pull_back


class PiGDM(Guided):
    """One call of the denoiser and one backward pass a step.

    Arguments:
        data_std: The standard deviation s of the data, above 0: 1 in the paper; of images in
            [-1, 1] it is about 0.5.

    Raises:
        ValueError: If s is not above 0.
    """

    requires = "linear"
    noiseless = True

    def __init__(self, data_std: float = 1.0) -> None:
        if not data_std > 0:
            raise ValueError(f"data_std={data_std} is not allowed; s is above 0")
        self.data_std = data_std

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return _PiGDM(denoiser, observation, self.data_std)


class _PiGDM(Conditional):
    def __init__(self, denoiser: Denoiser, observation: Observation, data_std: float) -> None:
        super().__init__(denoiser, observation)
        self.data_std = data_std

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoised, vjp = denoised_and_vjp(self.denoiser, x_t, t)
        variance = 1 / (self.schedule.ratio(t) ** -2 + self.data_std**-2)
        e = self.y - self.operator(denoised)
        pulled = pull_back(self.linear, e, variance, float(self.sigma_y))
        return denoised + self.scale(x_t, t) * vjp(pulled)
