r"""One step of the forward process and of its reverse: coefficients, variances, KL divergence.

With a = α_t / α_s and v = σ_t² - a² σ_s² for s < t, the forward transition and its posterior are

    q(x_t | x_s) = N(a x_s, v I),
    q(x_s | x_t, x_0) = N((a σ_s² x_t + α_s v x_0) / σ_t², β̃ I),    β̃ = v σ_s² / σ_t².

The model p(x_s | x_t) has x̂ in place of x_0, and a variance Σ between β̃ (exact if x_0 is known)
and v (exact if x_0 is white noise of unit variance). A network can learn the fraction f in [0, 1]
for each element of x_t:

    log Σ = f log v + (1 - f) log β̃,    Σ = v (σ_s² / σ_t²)^{1 - f}.

f is a function of x_t alone; v and β̃ are those of the step, for any s. The term of the step in the
variational bound is, in nats per element,

    KL(q ‖ p) = ½ [ℓ + e^{-ℓ} - 1 + e^{-ℓ} (SNR_s - SNR_t) (x_0 - x̂)²],
    ℓ = log (Σ / β̃) = f log (σ_t² / σ_s²).

The last step, to s = 0, is a discretized Gaussian: the probability of a pixel value is the mass of
N(x̂, Σ) in its bin. As β̃ = 0 there, the β̃ of the step before replaces it.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 5 to 8 and 13.
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 15.
"""

__all__ = [
    "Transition", "discretized_gaussian_nll", "final_step_variance", "kl_term", "transition",
]  # fmt: skip

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.schedule import Schedule

HALF_BIN = 1 / 255  # half the distance between two levels of 8 bits in [-1, 1]
INFINITE = 1e4  # standard deviations that stand for an infinite distance


class Transition(NamedTuple):
    """Coefficients of the step from t to s, float64.

    For one step they are tensors of shape () on the CPU. In a product with a state they adopt its
    type and device (torch's type promotion), after they have been combined in float64. Tensors of
    shape (B,) need `tensor.broadcast`.

    Attributes:
        alpha_s: α_s.
        sigma_s: σ_s.
        alpha_t: α_t.
        sigma_t: σ_t.
        variance: v = σ_t² - (α_t / α_s)² σ_s², the variance of q(x_t | x_s).
    """

    alpha_s: Tensor
    sigma_s: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    variance: Tensor

    def like(self, x: Tensor) -> "Transition":
        """Returns the coefficients with x's type and device, for arithmetic in x's precision."""
        return Transition(*(c.to(x, non_blocking=True) for c in self))

    def reverse_variance(self, fraction: Tensor | float) -> Tensor:
        """Returns Σ = v (σ_s² / σ_t²)^{1 - f}, the variance of p(x_s | x_t), float64.

        Arguments:
            fraction: f; 0 gives β̃ and 1 gives v.
        """
        base = self.sigma_s**2 / self.sigma_t**2
        if not base.ndim and base.device.type == "cpu":
            return self.variance * base.item() ** (1 - fraction)  # f may be on another device
        return self.variance * base ** (1 - fraction)


def transition(schedule: Schedule, t: Tensor | float, s: Tensor | float) -> Transition:
    """Returns the coefficients of the step from t to s.

    v is computed as α_t² (r_t² - r_s²), where the difference does not lose digits.

    Arguments:
        schedule: The schedule.
        t: The time t in (0, 1], of shape () or (B,).
        s: The time s in [0, 1], usually below t, of the same shape.
    """
    t, s = (torch.as_tensor(u, dtype=torch.float64) for u in (t, s))
    alpha_s, sigma_s = schedule(s)
    alpha_t, sigma_t = schedule(t)
    r_s, r_t = schedule.ratio(s), schedule.ratio(t)
    variance = alpha_t**2 * (r_t - r_s) * (r_t + r_s)
    return Transition(alpha_s, sigma_s, alpha_t, sigma_t, variance)


def kl_term(
    squared_error: Tensor, fraction: Tensor | float, snr_difference: Tensor, log_range: Tensor
) -> Tensor:
    """Returns KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) in nats per element.

    Arguments:
        squared_error: (x_0 - x̂)², of shape (B, *).
        fraction: f, which broadcasts against it.
        snr_difference: SNR_s - SNR_t, which broadcasts against it.
        log_range: log (v / β̃) = log (σ_t² / σ_s²), which broadcasts against it.

    Returns:
        The divergence, of the shape and type of `squared_error`.
    """
    gain = fraction * log_range
    return (gain + torch.expm1(-gain) + torch.exp(-gain) * snr_difference * squared_error) / 2


def final_step_variance(
    schedule: Schedule, first: Tensor | float, second: Tensor | float, fraction: Tensor
) -> Tensor:
    """Returns Σ of the step from t_1 to 0, of the shape and type of `fraction`.

    Arguments:
        schedule: The schedule.
        first: The time t_1.
        second: The time t_2 of the step before, to t_1; its β̃ is the lower end of Σ.
        fraction: f at t_1.
    """
    large = transition(schedule, first, 0.0).variance
    small = transition(schedule, second, first).reverse_variance(0.0)
    return torch.exp(torch.lerp(small.log().to(fraction), large.log().to(fraction), fraction))


def discretized_gaussian_nll(x_0: Tensor, denoised: Tensor, variance: Tensor) -> Tensor:
    """Returns -log of the mass of N(x̂, Σ) in the bin of x_0's level, in nats per element.

    The bins of the lowest and of the highest level extend to infinity.

    Source:
        Ho, Jain, Abbeel, 2020, eq. 13.

    Arguments:
        x_0: Images of 8 bits, in [-1, 1], of shape (B, *).
        denoised: x̂, of the same shape.
        variance: Σ, which broadcasts against it.
    """
    std = torch.sqrt(variance)
    low = torch.where(x_0 < -1 + HALF_BIN, -INFINITE, (x_0 - HALF_BIN - denoised) / std)
    high = torch.where(x_0 > 1 - HALF_BIN, INFINITE, (x_0 + HALF_BIN - denoised) / std)
    # Mirrored to the lower tail, where log Φ does not lose digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    log_mass: Tensor = log_high + torch.log(-torch.expm1(log_low - log_high))
    return -log_mass
