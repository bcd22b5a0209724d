r"""JFPS: moment matching with the covariance that Gaussian data would have. No backward pass.

    p(y | x_t) = N(y; A x̂, σ_y² I + A V Aᵀ),    V = (Σ_x⁻¹ + r_t⁻² I)⁻¹,
    E[x_0 | x_t, y] = x̂ + V Aᵀ (σ_y² I + A V Aᵀ)⁻¹ (y - A x̂),

x̂ = E[x_0 | x_t], r_t = σ_t / α_t, Σ_x the covariance of the data: all of it, one variance for each
number of an image, or s² I. It is exact for Gaussian data of covariance Σ_x.

Source:
    MMPS (Rozet et al., 2024), with the covariance of a Gaussian prior; named Jacobian-free
    posterior sampling in the library azula.
"""

__all__ = ["JFPS"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.guidance.linear_solve import conjugate_gradients, pull_back
from diffusion_lab.tensor import broadcast


class JFPS(Guided):
    """One call of the denoiser a step, as the prior alone.

    Arguments:
        data_std: The standard deviation s of the data, above 0, for Σ_x = s² I; of images in
            [-1, 1] it is about 0.5.
        covariance: Σ_x in place of s² I: of an image's shape * its diagonal, above 0; of shape
            (d, d), for images of d numbers, all of it, symmetric and positive semidefinite.
        iterations: With `covariance`, the number of conjugate-gradient iterations, at least 1;
            about d of them make the system exact. They do not call the network.

    Raises:
        ValueError: If s is not above 0, the covariance is none, or the iterations are below 1.
    """

    requires = "linear"
    noiseless = True

    def __init__(
        self, data_std: float = 0.5, covariance: Tensor | None = None, iterations: int = 50
    ) -> None:
        if not data_std > 0 or iterations < 1:
            raise ValueError(
                f"data_std={data_std} and iterations={iterations} are not allowed; above 0, at "
                "least 1"
            )
        self.data_std, self.covariance, self.iterations = data_std, covariance, iterations

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        if self.covariance is None:
            return _Isotropic(denoiser, observation, self.data_std)
        return _JFPS(denoiser, observation, self.covariance, self.iterations)


class _Isotropic(Conditional):
    def __init__(self, denoiser: Denoiser, observation: Observation, data_std: float) -> None:
        super().__init__(denoiser, observation)
        self.data_std = data_std

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoised = self.denoiser(x_t, t)
        variance = 1 / (self.schedule.ratio(t) ** -2 + self.data_std**-2)
        e = self.y - self.operator(denoised)
        shift = pull_back(self.linear, e, variance, float(self.sigma_y))
        return denoised + broadcast(variance, x_t) * shift


class _JFPS(Conditional):
    def __init__(
        self, denoiser: Denoiser, observation: Observation, covariance: Tensor, iterations: int
    ) -> None:
        super().__init__(denoiser, observation)
        self.iterations = iterations
        shape = observation.shape[1:]
        size = torch.Size(shape).numel()
        if tuple(covariance.shape) == shape:
            self.variances, self.axes = covariance.flatten(), None
        elif tuple(covariance.shape) == (size, size):
            self.variances, self.axes = torch.linalg.eigh(covariance.double())
        else:
            raise ValueError(
                f"the covariance is of shape {tuple(covariance.shape)}; for images of shape "
                f"{shape} it is of {shape} or {(size, size)}"
            )
        rounding = size * torch.finfo(torch.float64).eps * self.variances.amax()
        if not bool((self.variances >= -rounding).all()):
            raise ValueError(
                "the covariance of the data must be positive semidefinite; the smallest variance "
                f"is {float(self.variances.min()):.3g}"
            )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoised, a = self.denoiser(x_t, t), self.linear
        data = self.variances.to(x_t).clamp(min=0)
        square = broadcast(self.schedule.ratio(t), x_t.flatten(1)) ** 2
        variances = square * data / (square + data)
        axes = None if self.axes is None else self.axes.to(x_t)

        def pull(v: Tensor) -> Tensor:
            """V Aᵀ v."""
            x = a.adjoint(v).flatten(1)
            x = variances * x if axes is None else (variances * (x @ axes)) @ axes.T
            return x.reshape(x_t.shape)

        v = conjugate_gradients(
            lambda v: self.sigma_y**2 * v + a(pull(v)), self.y - a(denoised), self.iterations
        )
        return denoised + pull(v)
