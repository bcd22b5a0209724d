r"""Likelihood of 8-bit images under a prior, in bits per dimension.

A pixel p in {0, ..., 255} has the level x_0 = p / 127.5 - 1; the spacing is Δ = 1 / 127.5.

The probability-flow ODE has a density. Uniform dequantization gives a bound for pixels,

    bits/dim = -E_u log2 p(x_0 + Δ (u - ½)) / d + log2 127.5,    u ~ U[0, 1),

with the density of x_{t_min} / α, which contains noise of standard deviation r_{t_min}.

DDPM's variational bound needs no ODE: with the small variance, over the training times
t_1 < ... < t_T,

    L = KL(q(x_T | x_0) ‖ p(x_T)) + Σ_k ½ (SNR(t_{k-1}) - SNR(t_k)) E |x_0 - x̂(x_{t_k})|²
        - E log p(p | x_{t_1}),    p(p | x_t) ∝ exp(-(x_t / α_t - level p)² / 2 r_t²).

For a network with a learned variance, the terms of the sum are those of `transition` for its
variance fraction, and the last term is the mass of N(x̂, Σ) in the bin of the pixel: the bound that
the network was trained with.

Sources:
    Song et al., "Score-based generative modeling through SDEs", 2021, section 4.3.
    Theis et al., "A note on the evaluation of generative models", 2016, section 3.1.
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 5.
    Kingma et al., "Variational diffusion models", 2021, eq. 11 to 13 (the sum and the last term).
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 4 to 7.
"""

__all__ = ["bound", "flow"]

import math

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.rng import KeyedGenerator
from diffusion_lab.sampler.ode import ProbabilityFlow
from diffusion_lab.schedule import DiscreteSchedule, Schedule
from diffusion_lab.schedule.base import MAX_RATIO
from diffusion_lab.tensor import broadcast
from diffusion_lab.transition import discretized_gaussian_nll, final_step_variance, kl_term

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
NUM_TIMES = 1000  # number of times of the bound under a continuous schedule
MIN_RATIO = 0.005  # σ/α at the lowest of them


def flow(
    denoiser: Denoiser,
    solver: ProbabilityFlow,
    pixels: Tensor,
    generator: KeyedGenerator,
    exact: bool = False,
) -> Tensor:
    """Returns the bits per dimension by the probability-flow ODE, float64, of shape (B,).

    Arguments:
        denoiser: The prior, E[x_0 | x_t].
        solver: Solves the ODE.
        pixels: The images, uint8, of shape (B, *).
        generator: The source of the dequantization noise and of Hutchinson's v.
        exact: Whether the trace is exact, at d times the cost.

    Raises:
        SamplingError: If the solver does not converge.
    """
    u = generator.uniform(*pixels.shape[1:])
    x_0 = (pixels.to(u) + u - 0.5) / 127.5 - 1
    schedule, d = denoiser.schedule, x_0[0].numel()
    alpha_t = schedule(torch.tensor(schedule.t_min, dtype=torch.float64))[0]
    log_prob, _ = solver.log_prob(
        denoiser, alpha_t.to(x_0) * x_0, exact=exact, generator=generator
    )
    nats = log_prob + d * torch.log(alpha_t).to(log_prob)  # of x_t / α_t
    return -nats / (d * math.log(2)) + math.log2(127.5)


def _times(schedule: Schedule) -> Tensor:
    """The times t_1 < ... < t_T of the bound."""
    if isinstance(schedule, DiscreteSchedule):
        return torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
    # Uniform in log r, where the sum is nearest to its limit. The lowest level is about Δ: below
    # it the last term vanishes and the sum diverges.
    ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64))
    low, high = ends.clamp(min=MIN_RATIO, max=MAX_RATIO).log().tolist()
    times = schedule.t_from_ratio(torch.linspace(low, high, NUM_TIMES, dtype=torch.float64).exp())
    times[-1] = 1.0
    return times


@torch.no_grad()
@checked
def bound(
    denoiser: Denoiser, pixels: Tensor, generator: KeyedGenerator, terms: PositiveInt
) -> Tensor:
    """Returns an unbiased estimate of DDPM's bound in bits per dimension, float64, of shape (B,).

    Arguments:
        denoiser: The prior, E[x_0 | x_t].
        pixels: The images, uint8, of shape (B, *).
        generator: The source of the noise and of the choice of terms.
        terms: The number of terms drawn from the T - 1 of the sum, each a call of the denoiser.
    """
    schedule, shape = denoiser.schedule, pixels.shape[1:]
    times = _times(schedule).to(pixels.device)
    x_0 = (pixels.float() / 127.5 - 1).double()
    dims = tuple(range(1, x_0.ndim))

    alpha, sigma = (float(c) / schedule.prior_std for c in schedule(times[-1]))
    kl = 0.5 * (alpha**2 * x_0**2 + sigma**2 - 1 - 2 * math.log(sigma)).sum(dims)

    ratio = schedule.ratio(times).to(times)
    weight = (ratio[:-1] ** -2 - ratio[1:] ** -2) / 2
    sigma_square = schedule(times)[1].to(times) ** 2
    log_range = torch.log(sigma_square[1:] / sigma_square[:-1])
    # Terms are drawn in proportion to their values for |x_0 - x̂|² = r² / (1 + r²).
    mass = torch.cumsum(weight / (1 + ratio[1:] ** -2), 0)
    inner = torch.zeros_like(kl)
    for j in range(terms):
        u = (j + generator.uniform(dtype=torch.float64)) / terms
        k = torch.searchsorted(mass, u * mass[-1]).clamp(max=len(mass) - 1)
        probability = torch.where(k > 0, mass[k] - mass[k - 1], mass[0]) / mass[-1]
        t = times[k + 1]
        alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t))
        x_t = alpha_t * x_0 + sigma_t * generator.normal(*shape, dtype=torch.float64)
        denoised, fraction = denoiser.with_variance(x_t.float(), t)
        nats = kl_term(
            (denoised.double() - x_0).square(),
            0.0 if fraction is None else fraction.double(),
            *(broadcast(c[k], x_0) for c in (2 * weight, log_range)),
        )
        inner += nats.sum(dims) / probability / terms

    first = times[0]
    r = float(schedule.ratio(first))
    v = x_0 + r * generator.normal(*shape, dtype=torch.float64)  # x_t / α_t
    if fraction is None:
        decoder = _level_nats(v, pixels, r)
    else:
        x_t = schedule(first)[0].to(v) * v
        denoised, fraction = denoiser.with_variance(x_t.float(), first)
        assert fraction is not None
        variance = final_step_variance(schedule, first, times[1], fraction.double())
        decoder = discretized_gaussian_nll(x_0, denoised.double(), variance).sum(dims)
    return (kl + inner + decoder) / (x_0[0].numel() * math.log(2))


def _level_nats(v: Tensor, pixels: Tensor, r: float) -> Tensor:
    """-log p(p | x_t) with the closed-form decoder, for v = x_t / α_t, of shape (B,)."""
    levels = LEVELS.to(v)
    nats = v.new_zeros(len(v))
    for b, (value, pixel) in enumerate(zip(v.flatten(1), pixels.flatten(1).long(), strict=True)):
        logits = -((value[:, None] - levels) ** 2) / (2 * r**2)
        nats[b] = -logits.log_softmax(1).gather(1, pixel[:, None]).sum()
    return nats
