r"""Gaussian mixtures: priors with a closed-form denoiser and posterior.

    p(x_0) = Σ_k w_k N(x_0; μ_k, S_k),    S_k = Q_k diag(l_k) Q_kᵀ,    x_t = α_t x_0 + σ_t ε.

The axes Q_k are the same at every noise level. With

    u_k = Q_kᵀ (x_t - α_t μ_k),    v_k = α_t² l_k + σ_t²

the density of x_t and the posterior given x_t are

    p(x_t) = Σ_k w_k N(u_k; 0, diag v_k),    r_k = w_k N(u_k; 0, diag v_k) / p(x_t),
    E_k = μ_k + Q_k (α_t l_k u_k / v_k),    C_k = Q_k diag(σ_t² l_k / v_k) Q_kᵀ,
    E[x_0 | x_t] = Σ_k r_k E_k,
    Cov[x_0 | x_t] = Σ_k r_k (C_k + (E_k - E) (E_k - E)ᵀ),    E = E[x_0 | x_t].

The posterior given y = A x_0 + σ_y n, n ~ N(0, I), is a mixture. With L_k = Q_k diag(√l_k), the
singular value decomposition A L_k = U diag(g) Vᵀ and e = Uᵀ (y - A μ_k), component k has

    weight ∝ w_k N(e; 0, diag(g² + σ_y²)),    mean μ_k + L_k V diag(g / (g² + σ_y²)) e,
    covariance L_k V diag(σ_y² / (g² + σ_y²)) Vᵀ L_kᵀ,

where g is padded with zeros. α_t² + σ_t² = 1 is not assumed. All computations are in float64.
"""

__all__ = ["Gaussian", "GaussianMixture", "MixtureDenoiser"]

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ArgumentError
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast

TOLERANCE = 1e-6  # for weights and covariances that were computed in float32
EPSILON = torch.finfo(torch.float64).eps


class GaussianMixture(nn.Module):
    """A mixture of Gaussians, p(x_0) = Σ_k w_k N(μ_k, S_k).

    A covariance S_k may be singular; then a density exists only with noise, σ_t > 0.

    Arguments:
        weights: The weights w_k, of shape (K,), above 0; they sum to one.
        means: The means μ_k, of shape (K, d).
        covariances: The covariances S_k, of shape (K, d, d), symmetric and positive semidefinite.
        shape: The shape * of one x_0, of d elements; (d,) by default.

    Attributes:
        log_weights: log w_k, of shape (K,).
        means: μ_k, of shape (K, d).
        eigenvalues: l_k, of shape (K, d), ascending.
        axes: Q_k, of shape (K, d, d), with axes as columns.
        singular: Whether an eigenvalue is zero.
        shape: *.

    Raises:
        ValueError: If the shapes do not match, the weights are not positive or do not sum to one,
            a mean is not finite, or a covariance is not symmetric positive semidefinite.
    """

    log_weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    axes: Tensor

    def __init__(
        self, weights: Tensor, means: Tensor, covariances: Tensor, *,
        shape: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        weights, means, covariances = weights.double(), means.double(), covariances.double()
        _check(weights, means, covariances)
        self.shape = tuple(means.shape[1:] if shape is None else shape)
        if math.prod(self.shape) != means.shape[1]:
            raise ValueError(f"shape={self.shape} does not hold the d={means.shape[1]} numbers")
        eigenvalues, axes = _decomposed(covariances)
        self.singular = bool((eigenvalues == 0).any())
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", means.clone())
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("axes", axes)

    @property
    def weights(self) -> Tensor:
        """The weights w_k, of shape (K,)."""
        return self.log_weights.exp()

    @property
    def covariances(self) -> Tensor:
        """The covariances S_k = Q_k diag(l_k) Q_kᵀ, of shape (K, d, d)."""
        return (self.axes * self.eigenvalues[:, None]) @ self.axes.mT

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_0 = μ_k + Q_k (√l_k z) with k ~ w and z ~ N(0, I), of shape (n, *), float64.

        Arguments:
            n: The number of draws, above 0.
            generator: The source of random numbers; None for torch's global generator.
        """
        device = self.means.device if generator is None else generator.device
        components = torch.multinomial(self.weights.to(device), n, True, generator=generator)
        z = torch.randn(
            n, self.means.shape[1], dtype=torch.float64, device=device, generator=generator
        )
        x, components = z.to(self.means.device), components.to(self.means.device)
        # One component at a time: Q_k for each draw would need n d² elements.
        for k, (mean, scale) in enumerate(zip(self.means, self.eigenvalues.sqrt(), strict=True)):
            chosen = components == k
            x[chosen] = mean + (x[chosen] * scale) @ self.axes[k].T
        return x.reshape(n, *self.shape)

    def marginal(self, alpha_t: Tensor | float, sigma_t: Tensor | float) -> "GaussianMixture":
        """Returns the mixture that x_t is of, p(x_t) = Σ_k w_k N(α_t μ_k, α_t² S_k + σ_t² I).

        Arguments:
            alpha_t: α_t, one number.
            sigma_t: σ_t, one number.
        """
        alpha_t, sigma_t = float(alpha_t), float(sigma_t)
        noise = sigma_t**2 * torch.eye(self.means.shape[1]).to(self.means)
        covariances = alpha_t**2 * self.covariances + noise
        return self._like(self.log_weights, alpha_t * self.means, covariances)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log p(x_0) at x, of shape (B,).

        Arguments:
            x: The points, of shape (B, *).

        Raises:
            ValueError: If x has another shape, or a covariance is singular.
        """
        return self.log_prob_t(x, *_clean(x))

    def log_prob_t(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns log p(x_t) = log Σ_k w_k N(x_t; α_t μ_k, α_t² S_k + σ_t² I), of shape (B,).

        Arguments:
            x_t: The points, of shape (B, *).
            alpha_t: α_t, of shape () or (B,).
            sigma_t: σ_t, of shape () or (B,).

        Raises:
            ValueError: If x_t has another shape, or a covariance is singular and σ_t = 0.
        """
        return self._project(x_t, alpha_t, sigma_t)[2].logsumexp(1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Returns p(k | x_0) = w_k N(x_0; μ_k, S_k) / p(x_0) at x, of shape (B, K).

        Arguments:
            x: The points, of shape (B, *).

        Raises:
            ValueError: If x has another shape, or a covariance is singular.
        """
        return self._project(x, *_clean(x))[2].softmax(1)

    def whitened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z = l_k^(-1/2) Q_kᵀ (x - μ_k) for the most probable component k of each x.

        Arguments:
            x: The points, of shape (B, *).

        Returns:
            z of shape (B, d) and k of shape (B,).

        Raises:
            ValueError: If x has another shape, or a covariance is singular.
        """
        u, v, log_joint = self._project(x, *_clean(x))
        k = log_joint.argmax(1)
        return (u / v.sqrt())[torch.arange(len(k), device=k.device), k], k

    def mean_t(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns E[x_0 | x_t] = Σ_k r_k E_k, of shape (B, *), float64.

        Arguments:
            x_t: The noisy points, of shape (B, *).
            alpha_t: α_t, of shape () or (B,).
            sigma_t: σ_t, of shape () or (B,).

        Raises:
            ValueError: If x_t has another shape, or a covariance is singular and σ_t = 0.
        """
        u, v, log_joint = self._project(x_t, alpha_t, sigma_t)
        r = log_joint.softmax(1)
        shifts = r[..., None] * (broadcast(alpha_t, u) * self.eigenvalues / v) * u
        centre = (r[:, None] @ self.means)[:, 0]
        mean = centre + shifts.flatten(1) @ self._flat_axes().T
        return mean.reshape(len(x_t), *self.shape)

    def covariance_t(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns Cov[x_0 | x_t] = Σ_k r_k (C_k + (E_k - E) (E_k - E)ᵀ), of shape (B, d, d).

        Arguments:
            x_t: The noisy points, of shape (B, *).
            alpha_t: α_t, of shape () or (B,).
            sigma_t: σ_t, of shape () or (B,).

        Raises:
            ValueError: If x_t has another shape, or a covariance is singular and σ_t = 0.
        """
        r, means, variances = self._conditional(x_t, alpha_t, sigma_t)
        within = torch.einsum("bke,kde,kfe->bdf", r[..., None] * variances, self.axes, self.axes)
        deviations = means - torch.einsum("bk,bkd->bd", r, means)[:, None]
        return within + torch.einsum("bk,bkd,bkf->bdf", r, deviations, deviations)

    def denoiser(self, schedule: Schedule) -> "MixtureDenoiser":
        """Returns x_t, t -> E[x_0 | x_t] under a schedule.

        Arguments:
            schedule: The schedule of α_t and σ_t.
        """
        return MixtureDenoiser(self, schedule)

    def posterior(
        self, y: Tensor, operator: Tensor | Callable[[Tensor], Tensor], sigma_y: float
    ) -> "GaussianMixture":
        """Returns the mixture p(x_0 | y) for y = A x_0 + σ_y n, with components in the same order.

        Arguments:
            y: One observation, of m elements.
            operator: The matrix A, of shape (m, d), or a linear function of a batch (B, *).
            sigma_y: The noise σ_y, at least 0; 0 only if every A S_k Aᵀ has an inverse.

        Raises:
            ValueError: If the shapes of y, the operator and the mixture do not match, the function
                is not linear, σ_y < 0, or y has no density.
        """
        matrix = self._matrix(operator)
        if y.numel() != len(matrix):
            raise ValueError(f"y has {y.numel()} elements and the operator's output {len(matrix)}")
        if not sigma_y >= 0:
            raise ArgumentError("sigma_y", sigma_y, "a number >= 0")
        residuals = y.to(self.means).flatten() - self.means @ matrix.T
        log_evidence, shifts, covariances = self._observe(residuals, matrix, sigma_y)
        log_weights = (self.log_weights + log_evidence).log_softmax(0)
        return self._like(log_weights, self.means + shifts, covariances)

    def conditional_denoiser(
        self, schedule: Schedule, y: Tensor, operator: Tensor | Callable[[Tensor], Tensor],
        sigma_y: float,
    ) -> "MixtureDenoiser":  # fmt: skip
        """Returns x_t, t -> E[x_0 | x_t, y] for y = A x_0 + σ_y n.

        Arguments:
            schedule: The schedule of α_t and σ_t.
            y: One observation, or one for each row of x_t, of shape (B, m).
            operator: See `posterior`.
            sigma_y: See `posterior`.

        Raises:
            ValueError: See `posterior`.
        """
        matrix = self._matrix(operator)
        if y.numel() == len(matrix):
            return self.posterior(y, operator, sigma_y).denoiser(schedule)
        # The covariances are the same for all y; weights and means differ between rows.
        result = self.posterior(y[:1], operator, sigma_y)
        residuals = y.to(self.means).flatten(1)[:, None] - self.means @ matrix.T
        log_evidence, shifts, _ = self._observe(residuals, matrix, sigma_y)
        result.log_weights = (self.log_weights + log_evidence).log_softmax(1)
        result.means = self.means + shifts
        return result.denoiser(schedule)

    def _like(self, log_weights: Tensor, means: Tensor, covariances: Tensor) -> "GaussianMixture":
        """A mixture of the same shape, with weights that may underflow in float64."""
        equal = torch.full_like(log_weights, 1 / len(log_weights))
        result = GaussianMixture(equal, means, covariances, shape=self.shape)
        result.log_weights = log_weights.clone()
        return result

    def _flat_axes(self) -> Tensor:
        """The axes of all components side by side, of shape (d, K d)."""
        return self.axes.permute(1, 0, 2).flatten(1)

    def _project(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u_k (B, K, d), v_k that broadcasts against it, log w_k N(u_k; 0, diag v_k) (B, K)."""
        if x_t.shape[1:] != self.shape:
            expected = ", ".join(["B", *map(str, self.shape)])
            raise ValueError(f"x has shape {tuple(x_t.shape)}; the mixture needs ({expected})")
        x_t = x_t.double().flatten(1)[:, None]
        alpha_t, sigma_t = broadcast(alpha_t, x_t), broadcast(sigma_t, x_t)
        if self.singular and bool((sigma_t == 0).any()):
            raise ValueError("a covariance is singular: there is no density without noise")
        # One product for all components; that of the means, (K, d) or (B, K, d), is small or rare.
        turned = (x_t[:, 0] @ self._flat_axes()).reshape(len(x_t), *self.eigenvalues.shape)
        u = turned - alpha_t * torch.einsum("...kd,kde->...ke", self.means, self.axes)
        v = alpha_t**2 * self.eigenvalues + sigma_t**2
        return u, v, self.log_weights - (u**2 / v + torch.log(2 * math.pi * v)).sum(2) / 2

    def _conditional(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """r_k (B, K), E_k (B, K, d) and the eigenvalues of C_k (B, K, d)."""
        u, v, log_joint = self._project(x_t, alpha_t, sigma_t)
        alpha_t, sigma_t = broadcast(alpha_t, u), broadcast(sigma_t, u)
        gain = alpha_t * self.eigenvalues / v
        means = self.means + torch.einsum("bke,kde->bkd", gain * u, self.axes)
        return log_joint.softmax(1), means, (sigma_t**2 * self.eigenvalues / v).expand_as(u)

    def _observe(
        self, residuals: Tensor, matrix: Tensor, sigma_y: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log N(y; A μ_k, A S_k Aᵀ + σ_y² I) up to a constant, E_k[x_0 | y] - μ_k, Cov_k[x_0 | y].

        Arguments:
            residuals: y - A μ_k, of shape (K, m) or, for many y, (B, K, m).
            matrix: A, of shape (m, d).
            sigma_y: σ_y, at least 0.
        """
        m, d = matrix.shape
        factors = self.axes * self.eigenvalues.sqrt()[:, None]  # L_k
        u, g, vh = torch.linalg.svd(matrix @ factors)
        if sigma_y == 0 and (m > d or bool((g <= d * EPSILON * g.amax(1, True)).any())):
            raise ValueError("without noise (sigma_y=0) A S_k Aᵀ must have an inverse for every k")
        rank, loadings = g.shape[1], factors @ vh.mT  # L_k V
        variance = pad(g, (0, m - rank)) ** 2 + sigma_y**2
        e = torch.einsum("...km,kmn->...kn", residuals, u)
        log_evidence = -(e**2 / variance + variance.log()).sum(-1) / 2
        gain = g / variance[:, :rank]
        shifts = torch.einsum("kdr,...kr->...kd", loadings[..., :rank], gain * e[..., :rank])
        g = pad(g, (0, d - rank))
        # Unobserved directions keep their variance, also without noise, where the ratio is 0 / 0.
        shrinkage = torch.where(g > 0, sigma_y**2 / (g**2 + sigma_y**2), 1.0)
        return log_evidence, shifts, (loadings * shrinkage[:, None]) @ loadings.mT

    def _matrix(self, operator: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """A, of shape (m, d); for a function, from its values at the rows of the identity."""
        d = self.means.shape[1]
        if isinstance(operator, Tensor):
            if operator.ndim != 2 or operator.shape[1] != d:
                raise ValueError(f"the operator has shape {tuple(operator.shape)}, not (m, {d})")
            return operator.to(self.means)
        identity = torch.eye(d).to(self.means)
        # Negative and not ±1: this detects clipping, |x|, x² and constants.
        probe = torch.linspace(-3, -2, d).to(self.means)
        inputs = torch.cat([identity, probe[None]]).reshape(d + 1, *self.shape)
        *columns, output = operator(inputs).to(self.means).flatten(1)
        matrix = torch.stack(columns, 1)
        error, scale = (matrix @ probe - output).abs().max(), (matrix @ probe.diag()).abs().sum(1)
        if not bool(error <= 1e-5 * scale.max()):  # 1e-5: operators in float32
            raise ValueError("the operator is not linear")
        return matrix


class Gaussian(GaussianMixture):
    """A Gaussian, p(x_0) = N(μ, S): a mixture of one component.

    Arguments:
        mean: The mean μ, of shape (d,).
        covariance: The covariance S, of shape (d, d), symmetric and positive semidefinite.
        shape: See `GaussianMixture`.

    Raises:
        ValueError: See `GaussianMixture`.
    """

    def __init__(
        self, mean: Tensor, covariance: Tensor, *, shape: Sequence[int] | None = None
    ) -> None:
        super().__init__(mean.new_ones(1), mean[None], covariance[None], shape=shape)


class Mixture(Protocol):
    """A prior with a closed-form E[x_0 | x_t]."""

    def mean_t(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns E[x_0 | x_t], float64."""


class MixtureDenoiser(Denoiser):
    """E[x_0 | x_t] under a mixture of Gaussians or atoms, computed in float64, in x_t's type.

    Arguments:
        mixture: The prior p(x_0), or a posterior; it has `mean_t`.
        schedule: The schedule of α_t and σ_t.
    """

    def __init__(self, mixture: Mixture, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.mixture = mixture

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mixture.mean_t(x_t, *self.schedule(t.double())).to(x_t.dtype)


def _clean(x: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of t = 0."""
    return x.new_ones(()), x.new_zeros(())


def _check(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    """Raises ValueError unless they define a mixture; eigenvalues are checked elsewhere."""
    shapes = [tuple(x.shape) for x in (weights, means, covariances)]
    k, d = means.shape if means.ndim == 2 else (0, 0)
    if means.numel() == 0 or shapes != [(k,), (k, d), (k, d, d)]:
        raise ValueError(
            f"weights, means and covariances of shapes {shapes[0]}, {shapes[1]} and {shapes[2]} "
            "do not match; they must be (K,), (K, d) and (K, d, d)"
        )
    if not bool((weights > 0).all()):
        raise ValueError(f"the weights {weights.tolist()} must be above 0")
    if not abs(float(weights.sum()) - 1) <= TOLERANCE:
        raise ValueError(f"the weights sum to {float(weights.sum()):.9g}, not to 1")
    if not bool(means.isfinite().all()):
        raise ValueError("the means must be finite")
    asymmetry = (covariances - covariances.mT).abs().amax((1, 2))  # nan where not finite
    if not bool((asymmetry <= TOLERANCE * covariances.abs().amax((1, 2))).all()):
        raise ValueError("the covariances must be finite and symmetric")


def _decomposed(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """l_k and Q_k, with eigenvalues within rounding of zero set to zero."""
    eigenvalues, axes = torch.linalg.eigh((covariances + covariances.mT) / 2)
    largest = eigenvalues.abs().amax(1, True)
    if not bool((eigenvalues >= -TOLERANCE * largest).all()):
        raise ValueError(
            "the covariances must be positive semidefinite; "
            f"the smallest eigenvalue is {float(eigenvalues.min()):.3g}"
        )
    rounding = eigenvalues.shape[1] * EPSILON * largest
    return torch.where(eigenvalues > rounding, eigenvalues, 0.0), axes
