r"""Training losses: weightings w(t) of the squared error over noise levels.

    loss = E w(t) |x̂ - x_0|² = E w(t) / gain(t)² |output - target|²,    SNR = α_t² / σ_t².

The weights apply to the error of x̂, independently of the parameterization; only `Simple` weights
the error of the network's output. `Hybrid` also trains the variance of the reverse steps. The
distribution of t is chosen separately, see `timesteps`.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 14 (simple).
    Salimans, Ho, "Progressive distillation", 2022, section 4 (SNR).
    Hang et al., "Efficient diffusion training via min-SNR weighting strategy", 2023, eq. 8.
    Choi et al., "Perception prioritized training of diffusion models", 2022, eq. 8 (P2).
    Karras et al., "Elucidating the design space", 2022, table 1 (EDM).
    Song et al., "Maximum likelihood training of score-based diffusion models", 2021, eq. 7.
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 16 (hybrid).
"""

__all__ = ["EDM", "P2", "SNR", "Hybrid", "Likelihood", "Loss", "MinSNR", "Simple"]

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lab.constraints import NonNegative, Positive, checked
from diffusion_lab.parameterization import Parameterization
from diffusion_lab.schedule import DiscreteSchedule, Schedule
from diffusion_lab.tensor import broadcast
from diffusion_lab.transition import (
    discretized_gaussian_nll,
    final_step_variance,
    kl_term,
    transition,
)


class Loss(nn.Module, ABC):
    """A weighted squared error.

    Attributes:
        learns_variance: Whether it trains the variance of the reverse steps; then `forward` also
            takes the network's variance fraction and x_0.
    """

    learns_variance = False

    @abstractmethod
    def output_weight(
        self, schedule: Schedule, parameterization: Parameterization, t: Tensor
    ) -> Tensor:
        """Returns the weight of the error of the network's output, float64, of shape (B,)."""

    def forward(
        self,
        output: Tensor,
        target: Tensor,
        schedule: Schedule,
        parameterization: Parameterization,
        t: Tensor,
        fraction: Tensor | None = None,
        x_0: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss of each x_0, a weighted mean over its elements, of shape (B,).

        Arguments:
            output: The network's prediction, of shape (B, *).
            target: Its target, of the same shape.
            schedule: The schedule.
            parameterization: The parameterization of the network.
            t: The times, of shape (B,).
            fraction: The network's variance fraction; read by a loss that `learns_variance`.
            x_0: The clean states; read by a loss that `learns_variance`.
        """
        error = (output.float() - target).square().flatten(1).mean(1)
        return self.output_weight(schedule, parameterization, t).to(error) * error


class Simple(Loss):
    """Unit weight of the error of the network's output: L_simple for ε."""

    def output_weight(
        self, schedule: Schedule, parameterization: Parameterization, t: Tensor
    ) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


class Hybrid(Simple):
    r"""Hybrid loss: L_simple for the mean, and λ L_vlb for the variance of the reverse steps.

    L_vlb is the variational bound of the chain t = 1, 1 - 1/T, ..., 1/T, 0 in bits per dimension,
    without the term of x_1, which has no parameters. One term of its sum is drawn with t,

        L_hybrid = L_simple + λ T L_t,    s = t - 1/T,
        L_t = KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)),    L_{1/T} = -log p(x_0 | x_{1/T}),

    where L_t is a mean over the elements of x_0, divided by log 2. It has no gradient with respect
    to x̂: it trains the variance fraction only. With λ = 0.001 this is the paper's loss, and for
    any T the one that its authors' code names `RESCALED_MSE`.

    Arguments:
        vlb_weight: λ.
    """

    learns_variance = True

    @checked
    def __init__(self, vlb_weight: Positive = 0.001) -> None:
        super().__init__()
        self.vlb_weight = vlb_weight

    def forward(
        self,
        output: Tensor,
        target: Tensor,
        schedule: Schedule,
        parameterization: Parameterization,
        t: Tensor,
        fraction: Tensor | None = None,
        x_0: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss of each image, of shape (B,).

        Arguments:
            output: The network's prediction, of shape (B, *).
            target: Its target, of the same shape.
            schedule: The schedule, of T steps.
            parameterization: The parameterization of the network.
            t: The times, multiples of 1/T, of shape (B,).
            fraction: The network's variance fraction, of shape (B, *), see `transition`.
            x_0: The images, of 8 bits in [-1, 1], of shape (B, *).

        Raises:
            ValueError: If the schedule is not discrete, or `fraction` or `x_0` is missing.
        """
        if fraction is None or x_0 is None:
            raise ValueError("the hybrid loss needs the network's variance fraction, and x_0")
        simple = super().forward(output, target, schedule, parameterization, t)
        error = output.detach().float() - target
        alpha_t, sigma_t = (broadcast(c, error) for c in schedule(t))
        # x̂ is linear in the output: its error is the x̂ of the output's error at x_t = 0.
        error = parameterization.denoised(error, torch.zeros_like(error), alpha_t, sigma_t)
        term = self.term(error, fraction.float(), x_0, schedule, t)
        return simple + self.vlb_weight * schedule.steps * term

    @staticmethod
    def term(
        error: Tensor, fraction: Tensor, x_0: Tensor, schedule: Schedule, t: Tensor
    ) -> Tensor:
        """Returns L_t in bits per dimension, of shape (B,).

        Arguments:
            error: x̂ - x_0, of shape (B, *).
            fraction: The variance fraction, of the same shape.
            x_0: The images, of the same shape.
            schedule: The schedule, of T steps.
            t: The times, multiples of 1/T, of shape (B,).

        Raises:
            ValueError: If the schedule is not discrete.
        """
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                "loss=hybrid is the variational bound of a discrete chain, and "
                f"{type(schedule).__name__} is continuous; choose schedule=linear, quadratic, "
                "cosine, sigmoid or laplace"
            )
        step = 1 / schedule.steps
        first = t < 1.5 * step
        s = torch.where(first, t, t - step)  # the first has no KL term: s = t makes it 0
        pair = transition(schedule, t, s)
        snr_difference = schedule.ratio(s) ** -2 - schedule.ratio(t) ** -2
        log_range = 2 * torch.log(pair.sigma_t / pair.sigma_s)
        snr_difference, log_range = (broadcast(c, error) for c in (snr_difference, log_range))
        nats = kl_term(error.square(), fraction, snr_difference, log_range)
        first = broadcast(first, error).bool()
        # Errors of other times are masked: far from a level the likelihood is not finite.
        denoised = x_0 + torch.where(first, error, 0)
        variance = final_step_variance(schedule, step, 2 * step, fraction)
        nats = nats + torch.where(first, discretized_gaussian_nll(x_0, denoised, variance), 0)
        return nats.flatten(1).mean(1) / math.log(2)


class _Weighted(Loss):
    """A loss of x̂, independent of the parameterization."""

    @abstractmethod
    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Returns w(t), float64, of shape (B,)."""

    def output_weight(
        self, schedule: Schedule, parameterization: Parameterization, t: Tensor
    ) -> Tensor:
        return self.weight(schedule, t) / parameterization.gain(*schedule(t.double())) ** 2


class SNR(_Weighted):
    """w = SNR, which gives |ε̂ - ε|²; with `truncated`, w = max(SNR, 1).

    Arguments:
        truncated: Whether the weight is at least 1, so that an x_0-prediction network also learns
            the highest noise levels.
    """

    @checked
    def __init__(self, truncated: bool = False) -> None:
        super().__init__()
        self.truncated = truncated

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        snr = schedule.ratio(t) ** -2
        return snr.clamp(min=1) if self.truncated else snr


class MinSNR(_Weighted):
    """w = min(SNR, γ): limits the weight of low noise levels.

    Arguments:
        gamma: γ.
    """

    @checked
    def __init__(self, gamma: Positive = 5.0) -> None:
        super().__init__()
        self.gamma = gamma

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return (schedule.ratio(t) ** -2).clamp(max=self.gamma)


class P2(_Weighted):
    """w = SNR / (k + SNR)^γ: less weight at low noise, where only fine detail is lost.

    Arguments:
        gamma: γ; 0 gives `SNR`.
        k: k.
    """

    @checked
    def __init__(self, gamma: NonNegative = 1.0, k: Positive = 1.0) -> None:
        super().__init__()
        self.gamma, self.k = gamma, k

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        snr = schedule.ratio(t) ** -2
        return snr / (self.k + snr) ** self.gamma


class EDM(_Weighted):
    """w = (r² + σ_d²) / (r σ_d)²: unit weight of the EDM parameterization's output.

    Arguments:
        sigma_data: σ_d, the standard deviation of x_0.
    """

    @checked
    def __init__(self, sigma_data: Positive = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return self.sigma_data**-2 + schedule.ratio(t) ** -2


class Likelihood(_Weighted):
    """w = g² α_t² / σ_t⁴, which gives g² |ŝ - s|²: a bound on the negative log likelihood.

    It is twice the integrand of the bound in nats. Its variance is large for uniform t and small
    with `time=importance`.
    """

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        alpha_t, sigma_t = schedule(t.double())
        return (schedule.diffusion(t) * alpha_t / sigma_t**2) ** 2
