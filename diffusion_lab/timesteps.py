r"""Timestep samplers: distributions of the training times t.

Every t is a function of a uniform number u in [0, 1), which is drawn by the key of the training
example or, if stratified, from its interval in the global batch.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, algorithm 1 (uniform).
    Karras et al., "Elucidating the design space", 2022, table 1 (log-normal).
    Kingma et al., "Variational diffusion models", 2021, appendix I.1 (stratified).
    Song et al., "Maximum likelihood training of score-based diffusion models", 2021, section 5.1
    (importance).
"""

__all__ = ["Importance", "LogNormal", "TimestepSampler", "Uniform"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lab.constraints import Number, Positive, checked
from diffusion_lab.schedule import DiscreteSchedule, Schedule
from diffusion_lab.schedule.base import MAX_RATIO


class TimestepSampler(nn.Module, ABC):
    """A distribution of training times.

    Arguments:
        stratified: Whether a global batch of B has one u in each of B equal intervals, which
            reduces the variance of the loss and keeps its mean.
    """

    @checked
    def __init__(self, stratified: bool = False) -> None:
        super().__init__()
        self.stratified = stratified

    @abstractmethod
    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Returns times, and the importance weights of their losses.

        Arguments:
            u: Uniform numbers in [0, 1), float64, of shape (B,).
            schedule: The schedule.

        Returns:
            t in (0, 1] and the weights, which give a loss the mean of the uniform distribution;
            both float64, of shape (B,).
        """


def _uniform(u: Tensor, schedule: Schedule) -> Tensor:
    if isinstance(schedule, DiscreteSchedule):
        return ((u * schedule.steps).floor() + 1) / schedule.steps
    return schedule.t_min + u * (1 - schedule.t_min)


class Uniform(TimestepSampler):
    """t uniform over the T times k / T of a discrete schedule, or over [t_min, 1]."""

    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return _uniform(u, schedule), torch.ones_like(u)


class LogNormal(TimestepSampler):
    """log r ~ N(mean, std²), clamped to the schedule, without importance weights (EDM).

    Arguments:
        mean: Mean of log r_t, r_t = σ_t / α_t.
        std: Standard deviation of log r_t.
        stratified: See `TimestepSampler`.
    """

    @checked
    def __init__(self, mean: Number = -1.2, std: Positive = 1.2, stratified: bool = False) -> None:
        super().__init__(stratified)
        self.mean, self.std = mean, std

    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        normal = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        ratio = torch.exp(self.mean + self.std * normal).clamp(*schedule.ratio_range())
        return schedule.t_from_ratio(ratio).to(u), torch.ones_like(u)


class Importance(TimestepSampler):
    """t with density p ∝ g² / σ_t² and importance weight 1 / p.

    With the likelihood weighting, |ε̂ - ε|² then has the same weight at every t, to 0.25%, the
    error of the tabulated density.

    Arguments:
        stratified: See `TimestepSampler`.
    """

    POINTS = 4096  # of the table

    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        # Uniform in log r, where the density is smooth.
        ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64))
        ends = ends.clamp(max=MAX_RATIO).log()
        level = torch.linspace(float(ends[0]), float(ends[1]), self.POINTS, dtype=torch.float64)
        t = schedule.t_from_ratio(level.exp().clamp(max=float(schedule.ratio(1.0)))).to(u)
        density = (schedule.diffusion(t) / schedule(t)[1]) ** 2
        mass = torch.cumulative_trapezoid(density, t)
        mass = torch.cat([mass.new_zeros(1), mass])
        wanted = u * mass[-1]
        k = torch.searchsorted(mass, wanted, right=True).clamp(1, self.POINTS - 1)
        weight = (wanted - mass[k - 1]) / (mass[k] - mass[k - 1])
        drawn = torch.lerp(t[k - 1], t[k], weight)
        # t is uniform within an interval: its density there is the mass over the length.
        factor = mass[-1] * (t[k] - t[k - 1]) / (mass[k] - mass[k - 1])
        return drawn, factor / (1 - schedule.t_min)
