r"""Prior on a finite set of points, with an exact posterior for any observation.

    p(x_0) = Σ_i w_i δ(x_0 - a_i).

With x_t = α_t x_0 + σ_t ε and an observation y = A(x_0) + σ_y n by any function A,

    p(i | x_t) ∝ w_i exp(-|x_t - α_t a_i|² / 2σ_t²),    E[x_0 | x_t] = Σ_i p(i | x_t) a_i,
    p(i | y) ∝ w_i exp(-|y - A(a_i)|² / 2σ_y²):

the posterior has the same atoms with other weights. A network that fits its training set
perfectly has this prior, with the training examples as atoms.
"""

__all__ = ["Atoms"]

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_lab.analytic.gaussian_mixture import MixtureDenoiser
from diffusion_lab.errors import ArgumentError
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast


class Atoms(nn.Module):
    """A discrete prior on N points.

    Arguments:
        points: The atoms a_i, of shape (N, *), finite.
        weights: The weights w_i, of shape (N,), or one set for each row of x_t, of shape (B, N);
            at least 0, and each set sums to one. Equal ones if None.

    Attributes:
        points: a_i, float64, of shape (N, *).
        log_weights: log w_i, of shape (N,) or (B, N).
        shape: *.

    Raises:
        ValueError: If the points are not finite, or the weights do not fit them.
    """

    points: Tensor
    log_weights: Tensor

    def __init__(self, points: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        points = points.double()
        count = len(points)
        weights = points.new_full((count,), 1 / count) if weights is None else weights.double()
        if points.ndim < 2 or not count or not bool(points.isfinite().all()):
            raise ValueError(
                f"points of shape {tuple(points.shape)}: they must be of shape (N, *) and finite"
            )
        if weights.shape[-1] != count or not bool((weights >= 0).all()):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} for {count} points; they must be >= 0, "
                "one for each point"
            )
        if not bool(((weights.sum(-1) - 1).abs() <= 1e-6).all()):
            raise ValueError(f"the weights sum to {weights.sum(-1)}, not to 1")
        self.shape = tuple(points.shape[1:])
        self.register_buffer("points", points.clone())
        self.register_buffer("log_weights", weights.log())

    @property
    def weights(self) -> Tensor:
        """The weights w_i."""
        return self.log_weights.exp()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n atoms by their weights, of shape (n, *), float64.

        Arguments:
            n: The number of draws, above 0.
            generator: The source of random numbers; None for torch's global generator.
        """
        chosen = torch.multinomial(self.weights, n, True, generator=generator)
        return self.points[chosen]

    def responsibilities(self, x: Tensor) -> Tensor:
        """Returns the one-hot index of the atom nearest to x, of shape (B, N), float64."""
        nearest = torch.cdist(x.double().flatten(1), self.points.flatten(1)).argmin(1)
        return nn.functional.one_hot(nearest, len(self.points)).double()

    def mean_t(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns E[x_0 | x_t] = Σ_i p(i | x_t) a_i, of shape (B, *), float64.

        Arguments:
            x_t: The noisy points, of shape (B, *).
            alpha_t: α_t, of shape () or (B,).
            sigma_t: σ_t, of shape () or (B,), above 0.
        """
        x_t, points = x_t.double().flatten(1), self.points.flatten(1)
        alpha_t, sigma_t = broadcast(alpha_t, x_t), broadcast(sigma_t, x_t)
        # |x - α a|² without |x|², which does not depend on the atom.
        log_joint = alpha_t * (x_t @ points.T) - alpha_t**2 * points.square().sum(1) / 2
        r = (self.log_weights + log_joint / sigma_t**2).softmax(1)
        return (r @ points).reshape(len(x_t), *self.shape)

    def denoiser(self, schedule: Schedule) -> MixtureDenoiser:
        """Returns x_t, t -> E[x_0 | x_t] under a schedule."""
        return MixtureDenoiser(self, schedule)

    def posterior(
        self, y: Tensor, operator: Callable[[Tensor], Tensor], sigma_y: float
    ) -> "Atoms":
        """Returns p(x_0 | y) for y = A(x_0) + σ_y n: the same atoms with other weights.

        Arguments:
            y: One observation of m elements, or one for each row of x_t, of shape (B, *').
            operator: The function A of a batch (N, *).
            sigma_y: σ_y, above 0.

        Raises:
            ValueError: If σ_y is not above 0.
        """
        if not sigma_y > 0:
            raise ArgumentError("sigma_y", sigma_y, "a number > 0")
        seen = operator(self.points).double().flatten(1)
        rows = y.double().reshape(-1, seen.shape[1])
        log_likelihood = -torch.cdist(rows, seen).square() / (2 * sigma_y**2)
        weights = (self.log_weights + log_likelihood).softmax(1)
        return Atoms(self.points, weights if len(rows) > 1 else weights[0])

    def conditional_denoiser(
        self, schedule: Schedule, y: Tensor, operator: Callable[[Tensor], Tensor], sigma_y: float
    ) -> MixtureDenoiser:
        """Returns x_t, t -> E[x_0 | x_t, y]; arguments as of `posterior`."""
        return self.posterior(y, operator, sigma_y).denoiser(schedule)
