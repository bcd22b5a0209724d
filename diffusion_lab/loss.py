r"""Losses: what an error of the network weighs at each noise level.

    loss = E w(t) |x̂ - x_0|² = E w(t) / gain(t)² |output - target|²,    SNR = α_t² / σ_t².

The weights are written for the error of x̂, whatever the network predicts; `Simple` alone weighs
the network's own output. How t is drawn is another matter: `time.py`.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 14 (simple).
    Salimans, Ho, "Progressive distillation", 2022, section 4 (SNR).
    Hang et al., "Efficient diffusion training via min-SNR weighting strategy", 2023, eq. 8.
    Choi et al., "Perception prioritized training of diffusion models", 2022, eq. 8 (P2).
    Karras et al., "Elucidating the design space", 2022, table 1 (EDM).
    Song et al., "Maximum likelihood training of score-based diffusion models", 2021, eq. 7.
"""

__all__ = ["EDM", "P2", "SNR", "Likelihood", "Loss", "MinSNR", "Simple"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lab.parameterization import Parameterization
from diffusion_lab.schedule import Schedule


class Loss(nn.Module, ABC):
    """A weighted squared error."""

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
