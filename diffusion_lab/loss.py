r"""Losses: what an error of the network weighs at each noise level.

    loss = E w(t) |x̂ - x_0|² = E w(t) / gain(t)² |output - target|²,    SNR = α_t² / σ_t².

The weights are written for the error of x̂, whatever the network predicts; `Simple` alone weighs
the network's own output. `Hybrid` also teaches the network the variance of the reverse steps. How
t is drawn is another matter: `time.py`.

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

from diffusion_lab.parameterization import Parameterization
from diffusion_lab.schedule import DiscreteSchedule, Schedule
from diffusion_lab.tensor import broadcast
from diffusion_lab.transition import last_variance, pixel_nats, step_nats, transition


class Loss(nn.Module, ABC):
    """A weighted squared error.

    Attributes:
        learns_variance: Whether it teaches a network the variance of the reverse steps; then
            `forward` takes the network's share and x_0 as well.
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
    ) -> Tensor:
        """Returns the loss of each image: the weighted mean over its numbers, of shape (B,)."""
        error = (output.float() - target).square().flatten(1).mean(1)
        return self.output_weight(schedule, parameterization, t).to(error) * error


class Simple(Loss):
    """All levels alike in terms of what the network predicts: L_simple for ε."""

    def output_weight(
        self, schedule: Schedule, parameterization: Parameterization, t: Tensor
    ) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


class Hybrid(Simple):
    r"""L_simple for the mean, and λ L_vlb for the variance of the reverse steps.

    L_vlb is the variational bound of the chain t = 1, 1 - 1/T, ..., 1/T, 0 in bits per dimension,
    but for the part of x_1, which nothing is learned from. Of its sum one term is drawn with t,

        L_hybrid = L_simple + λ T L_t,    s = t - 1/T,
        L_t = KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)),    L_{1/T} = -log p(x_0 | x_{1/T}),

    L_t being a mean over the numbers of the image, and divided by log 2. In it the mean has no
    gradient: it teaches the share only. With λ = 0.001 this is the paper's loss, and for any T the
    one that its authors' programs name `RESCALED_MSE`.

    Arguments:
        vlb_weight: λ, above 0.
    """

    learns_variance = True

    def __init__(self, vlb_weight: float = 0.001) -> None:
        super().__init__()
        if not vlb_weight > 0:
            raise ValueError(f"vlb_weight={vlb_weight} is not allowed; it is above 0")
        self.vlb_weight = vlb_weight

    def forward(
        self,
        output: Tensor,
        target: Tensor,
        schedule: Schedule,
        parameterization: Parameterization,
        t: Tensor,
        share: Tensor,
        x_0: Tensor,
    ) -> Tensor:
        """Returns the loss of each image, of shape (B,).

        Arguments:
            output: The network's prediction, of shape (B, *).
            target: What it should be.
            schedule: The schedule, of T steps.
            parameterization: What the network predicts.
            t: The times, multiples of 1/T, of shape (B,).
            share: The network's share of v in the variance, of shape (B, *).
            x_0: The images, of 8 bits in [-1, 1].

        Raises:
            ValueError: If the schedule has no steps.
        """
        simple = super().forward(output, target, schedule, parameterization, t)
        error = output.detach().float() - target
        alpha_t, sigma_t = (broadcast(c, error) for c in schedule(t))
        # x̂ is linear in the output: its error is the x̂ of the output's error at x_t = 0.
        error = parameterization.denoised(error, torch.zeros_like(error), alpha_t, sigma_t)
        term = self.term(error, share.float(), x_0, schedule, t)
        return simple + self.vlb_weight * schedule.steps * term

    @staticmethod
    def term(error: Tensor, share: Tensor, x_0: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
        """Returns L_t in bits per dimension, of shape (B,).

        Arguments:
            error: x̂ - x_0, of shape (B, *).
            share: The share, of the same shape.
            x_0: The images, of the same shape.
            schedule: The schedule, of T steps.
            t: The times, multiples of 1/T, of shape (B,).

        Raises:
            ValueError: If the schedule has no steps.
        """
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"loss=hybrid is the bound of a chain of T steps, and {type(schedule).__name__} "
                "has none; choose schedule=linear, quadratic, cosine, sigmoid or laplace"
            )
        step = 1 / schedule.steps
        first = t < 1.5 * step
        s = torch.where(first, t, t - step)  # no step and no KL of those: they have the pixels
        _, sigma_s, _, sigma_t, _ = transition(schedule, t, s)
        fall = schedule.ratio(s) ** -2 - schedule.ratio(t) ** -2
        log_range = 2 * torch.log(sigma_t / sigma_s)
        fall, log_range = (broadcast(c, error) for c in (fall, log_range))
        nats = step_nats(error.square(), share, fall, log_range)
        first = broadcast(first, error).bool()
        # The errors of other times are out of range here.
        denoised = x_0 + torch.where(first, error, 0)
        variance = last_variance(schedule, step, 2 * step, share)
        nats = nats + torch.where(first, pixel_nats(x_0, denoised, variance), 0)
        return nats.flatten(1).mean(1) / math.log(2)


class _Weighted(Loss):
    """A loss of x̂, the same whatever the network predicts."""

    @abstractmethod
    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Returns w(t), float64, of shape (B,)."""

    def output_weight(
        self, schedule: Schedule, parameterization: Parameterization, t: Tensor
    ) -> Tensor:
        return self.weight(schedule, t) / parameterization.gain(*schedule(t.double())) ** 2


class SNR(_Weighted):
    """w = SNR, which is |ε̂ - ε|²; with `truncated`, w = max(SNR, 1).

    Arguments:
        truncated: Whether the weight is at least 1, so that a network of x_0 learns the noisiest
            levels, too.
    """

    def __init__(self, truncated: bool = False) -> None:
        super().__init__()
        self.truncated = truncated

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        snr = schedule.ratio(t) ** -2
        return snr.clamp(min=1) if self.truncated else snr


class MinSNR(_Weighted):
    """w = min(SNR, γ): no level outweighs the others.

    Arguments:
        gamma: γ, above 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"gamma={gamma} is not allowed; it is above 0")
        self.gamma = gamma

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return (schedule.ratio(t) ** -2).clamp(max=self.gamma)


class P2(_Weighted):
    """w = SNR / (k + SNR)^γ: less weight where only imperceptible detail is left to learn.

    Arguments:
        gamma: γ, at least 0; 0 is `SNR`.
        k: k, above 0.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        super().__init__()
        if not (gamma >= 0 and k > 0):
            raise ValueError(f"gamma={gamma} and k={k} are not allowed; gamma >= 0, k > 0")
        self.gamma, self.k = gamma, k

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        snr = schedule.ratio(t) ** -2
        return snr / (self.k + snr) ** self.gamma


class EDM(_Weighted):
    """w = (r² + σ_d²) / (r σ_d)²: unit weight of the EDM parameterization's output.

    Arguments:
        sigma_data: σ_d, the standard deviation of the images in [-1, 1], above 0.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data} is not allowed; it is above 0")
        self.sigma_data = sigma_data

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        return self.sigma_data**-2 + schedule.ratio(t) ** -2


class Likelihood(_Weighted):
    """w = g² α_t² / σ_t⁴, which is g² |ŝ - s|²: a bound of the negative log likelihood.

    Twice the bound's integrand in nats; with t uniform it has much variance, with
    `time=importance` little.
    """

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        alpha_t, sigma_t = schedule(t.double())
        return (schedule.diffusion(t) * alpha_t / sigma_t**2) ** 2
