r"""The step back from t to s in a chain of noise levels: its variance, and what it costs in bits.

With a = α_t / α_s and v = σ_t² - a² σ_s², the variance of q(x_t | x_s),

    q(x_s | x_t, x_0) = N((a σ_s² x_t + α_s v x_0) / σ_t², β̃ I),    β̃ = v σ_s² / σ_t².

The model of it has x̂ in the place of x_0, and a variance Σ. β̃ is right for an image that is known
and v for images of white noise of unit variance. A network may learn where between them it lies, a
share for each number of the image:

    log Σ = share log v + (1 - share) log β̃,    Σ = v (σ_s² / σ_t²)^{1 - share}.

The share belongs to x_t; whichever s the step goes to, v and β̃ are those of this step. The step's
part in the variational bound is, in nats and for each number,

    KL(q ‖ p) = ½ [ℓ + e^{-ℓ} - 1 + e^{-ℓ} (SNR_s - SNR_t) (x_0 - x̂)²],
    ℓ = log (Σ / β̃) = share log (σ_t² / σ_s²).

Of the last step, to s = 0, a pixel is made: its probability is the mass of N(x̂, Σ) in its bin. β̃
is 0 there; that of the step before takes its place.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 5 to 8 and 13.
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 15.
"""

__all__ = ["last_variance", "pixel_nats", "step_nats", "step_variance", "transition"]

import torch
from torch import Tensor

from diffusion_lab.schedule import Schedule

HALF_BIN = 1 / 255  # half of what lies between two levels of 8 bits in [-1, 1]
FAR = 1e4  # so many standard deviations away there is nothing


def transition(schedule: Schedule, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, ...]:
    """Returns α_s, σ_s, α_t, σ_t and v of the step from t to s, float64.

    v = σ_t² - (α_t / α_s)² σ_s² is the variance of q(x_t | x_s) = N(α_t / α_s x_s, v I). It is
    computed from the ratios, where the difference keeps its digits: α_t² (r_t² - r_s²).
    """
    t, s = (torch.as_tensor(u, dtype=torch.float64) for u in (t, s))
    alpha_s, sigma_s = schedule(s)
    alpha_t, sigma_t = schedule(t)
    r_s, r_t = schedule.ratio(s), schedule.ratio(t)
    return alpha_s, sigma_s, alpha_t, sigma_t, alpha_t**2 * (r_t - r_s) * (r_t + r_s)


def step_variance(v: Tensor, sigma_s: Tensor, sigma_t: Tensor, share: Tensor | float) -> Tensor:
    """Returns Σ of a step, float64.

    Arguments:
        v: The variance v of `transition`.
        sigma_s: σ_s.
        sigma_t: σ_t.
        share: The share; 0 gives β̃ and 1 gives v.
    """
    base = sigma_s**2 / sigma_t**2
    if not base.ndim and base.device.type == "cpu":
        return v * base.item() ** (1 - share)  # the share may be on another device
    return v * base ** (1 - share)


def step_nats(square: Tensor, share: Tensor | float, fall: Tensor, log_range: Tensor) -> Tensor:
    """Returns KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) of each number, of `square`'s shape and type.

    Arguments:
        square: (x_0 - x̂)², of shape (B, *).
        share: The share, which broadcasts against it.
        fall: SNR_s - SNR_t, which broadcasts against it.
        log_range: log (v / β̃) = log (σ_t² / σ_s²), likewise.
    """
    gain = share * log_range
    return (gain + torch.expm1(-gain) + torch.exp(-gain) * fall * square) / 2


def last_variance(
    schedule: Schedule, first: Tensor | float, second: Tensor | float, share: Tensor
) -> Tensor:
    """Returns Σ of the step to 0, of share's shape and type.

    Arguments:
        schedule: The schedule.
        first: The time t_1 that the step starts from.
        second: The time t_2 before it, whose β̃ limits Σ in the place of 0.
        share: The share at t_1.
    """
    v = transition(schedule, first, 0.0)[4]
    _, sigma_s, _, sigma_t, v_before = transition(schedule, second, first)
    small = step_variance(v_before, sigma_s, sigma_t, 0.0)
    return torch.exp(torch.lerp(small.log().to(share), v.log().to(share), share))


def pixel_nats(x_0: Tensor, denoised: Tensor, variance: Tensor) -> Tensor:
    """Returns -log of the mass of N(x̂, Σ) in the bin of x_0's level, of x_0's shape and type.

    The bins of the darkest and of the brightest level reach to infinity.

    Source:
        Ho, Jain, Abbeel, 2020, eq. 13.

    Arguments:
        x_0: The image of 8 bits, in [-1, 1], of shape (B, *).
        denoised: x̂, of the same shape.
        variance: Σ, which broadcasts against it.
    """
    std = torch.sqrt(variance)
    low = torch.where(x_0 < -1 + HALF_BIN, -FAR, (x_0 - HALF_BIN - denoised) / std)
    high = torch.where(x_0 > 1 - HALF_BIN, FAR, (x_0 + HALF_BIN - denoised) / std)
    # In the lower tail, where logarithms of Φ keep their digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log(-torch.expm1(log_low - log_high)))
