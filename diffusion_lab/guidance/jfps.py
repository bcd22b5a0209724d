r"""JFPS: Jacobian-free posterior sampling, moment matching with a Gaussian covariance.

    p(y | x_t) = N(y; A x̂, σ_y² I + A V Aᵀ),    V = (Σ_x⁻¹ + r_t⁻² I)⁻¹,
    E[x_0 | x_t, y] = x̂ + V Aᵀ (σ_y² I + A V Aᵀ)⁻¹ (y - A x̂),

x̂ = E[x_0 | x_t], r_t = σ_t / α_t, Σ_x the covariance of the data: a full matrix, a diagonal, or
s² I. The method is exact for Gaussian data of covariance Σ_x and needs no backward pass.

Source:
    MMPS (Rozet et al., 2024) with the covariance of a Gaussian prior; named Jacobian-free
    posterior sampling in the library azula.
"""

__all__ = ["JFPS"]

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.linear_solve import conjugate_gradients, pull_back
from diffusion_lab.tensor import broadcast


class JFPS(Guided):
    """JFPS: one call of the denoiser per step, as many as the prior alone needs.

    Arguments:
        data_std: The standard deviation s of the data, for Σ_x = s² I; about 0.5 for images in
            [-1, 1].
        covariance: Σ_x in place of s² I: of the shape * of a state its diagonal, above 0; of shape
            (d, d), for states of d elements, the full matrix, symmetric and positive semidefinite.
        iterations: With `covariance`, the number of conjugate-gradient iterations; about d of them
            solve the system exactly. They do not call the network.
    """

    requires = "linear"
    allows_noiseless = True

    @checked
    def __init__(
        self,
        data_std: Positive = 0.5,
        covariance: Tensor | None = None,
        iterations: PositiveInt = 50,
    ) -> None:
        self.data_std, self.covariance, self.iterations = data_std, covariance, iterations
        self._eigen: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def check(self, observation: Observation) -> None:
        """Raises ValueError as `Guidance.check`, or if the covariance does not fit the data."""
        super().check(observation)
        if self.covariance is not None:
            self._eigenvalues(self.covariance, observation.shape[1:])

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        a, sigma_y, ratio = observation.linear, observation.sigma_y, denoiser.schedule.ratio(t)
        denoised: Tensor = denoiser(x_t, t)
        residual = observation.y - a(denoised)
        if self.covariance is None:
            variance = 1 / (ratio**-2 + self.data_std**-2)
            shift = pull_back(a, residual, variance, float(sigma_y))
            return denoised + broadcast(variance, x_t) * shift
        data, axes = self._eigenvalues(self.covariance, observation.shape[1:])
        data, axes = data.to(x_t).clamp(min=0), None if axes is None else axes.to(x_t)
        square = broadcast(ratio, x_t.flatten(1)) ** 2
        variances = square * data / (square + data)

        def pull(v: Tensor) -> Tensor:
            """V Aᵀ v."""
            x = a.adjoint(v).flatten(1)
            x = variances * x if axes is None else (variances * (x @ axes)) @ axes.T
            return x.reshape(x_t.shape)

        v = conjugate_gradients(lambda v: sigma_y**2 * v + a(pull(v)), residual, self.iterations)
        return denoised + pull(v)

    def _eigenvalues(
        self, covariance: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The eigenvalues of Σ_x and its eigenvectors, None if it is diagonal."""
        if shape not in self._eigen:
            self._eigen[shape] = _decomposed(covariance, shape)
        return self._eigen[shape]


def _decomposed(covariance: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    size = torch.Size(shape).numel()
    values: Tensor
    axes: Tensor | None
    if tuple(covariance.shape) == shape:
        values, axes = covariance.flatten(), None
    elif tuple(covariance.shape) == (size, size):
        values, axes = torch.linalg.eigh(covariance.double())
    else:
        raise ValueError(
            f"the covariance is of shape {tuple(covariance.shape)}; for states of shape {shape} "
            f"it must be of shape {shape} or {(size, size)}"
        )
    rounding = size * torch.finfo(torch.float64).eps * values.amax()
    if not bool((values >= -rounding).all()):
        raise ValueError(
            "the covariance of the data must be positive semidefinite; its smallest eigenvalue "
            f"is {float(values.min()):.3g}"
        )
    return values, axes
