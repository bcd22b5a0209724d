r"""How the times of training are drawn.

Every t is a function of a uniform number u in [0, 1), which comes from the image's own key, or,
stratified, from the image's place in the global batch.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, algorithm 1 (uniform).
    Karras et al., "Elucidating the design space", 2022, table 1 (log-normal).
    Kingma et al., "Variational diffusion models", 2021, appendix I.1 (stratified).
    Song et al., "Maximum likelihood training of score-based diffusion models", 2021, section 5.1
    (importance).
"""

__all__ = ["Importance", "LogNormal", "Time", "Uniform"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lab.schedule import DiscreteSchedule, Schedule
from diffusion_lab.schedule.base import LARGEST


class Time(nn.Module, ABC):
    """A distribution of training times.

    Arguments:
        stratified: Whether the u of a global batch of B are one in each of B equal intervals:
            the loss has less variance, and its mean is the same.
    """

    def __init__(self, stratified: bool = False) -> None:
        super().__init__()
        self.stratified = stratified

    @abstractmethod
    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Returns times, and the factors that make their loss that of uniform times.

        Arguments:
            u: Uniform numbers in [0, 1), float64, of shape (B,).
            schedule: The schedule.

        Returns:
            t in (0, 1] and the factors, float64, of shape (B,).
        """


def _uniform(u: Tensor, schedule: Schedule) -> Tensor:
    if isinstance(schedule, DiscreteSchedule):
        return ((u * schedule.steps).floor() + 1) / schedule.steps
    return schedule.t_min + u * (1 - schedule.t_min)


class Uniform(Time):
    """t uniform over DDPM's T times k / T, or over [t_min, 1] of a continuous schedule."""

    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return _uniform(u, schedule), torch.ones_like(u)


class LogNormal(Time):
    """log r ~ N(mean, std²), within the schedule; the weight is left as it is (EDM).

    Arguments:
        mean: Mean of log r_t, r_t = σ_t / α_t.
        std: Standard deviation of log r_t, above 0.
        stratified: See `Time`.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> None:
        super().__init__(stratified)
        if not std > 0:
            raise ValueError(f"std={std} is not allowed; it is above 0")
        self.mean, self.std = mean, std

    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        normal = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        ends = torch.tensor([schedule.t_min, 1.0], dtype=torch.float64)
        low, high = schedule.ratio(ends).tolist()
        ratio = torch.exp(self.mean + self.std * normal).clamp(low, high)
        return schedule.t_from_ratio(ratio).to(u), torch.ones_like(u)


class Importance(Time):
    """t with density p ∝ g² / σ_t², and the factor 1 / p.

    With the likelihood weight |ε̂ - ε|² has the same weight at every t, to a quarter of a percent:
    the density is that of a table.

    Arguments:
        stratified: See `Time`.
    """

    POINTS = 4096  # of the table of the distribution

    def forward(self, u: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        # Spaced evenly in log r, where the density is smooth.
        ends = schedule.ratio(torch.tensor([schedule.t_min, 1.0], dtype=torch.float64))
        ends = ends.clamp(max=LARGEST).log()
        level = torch.linspace(float(ends[0]), float(ends[1]), self.POINTS, dtype=torch.float64)
        t = schedule.t_from_ratio(level.exp().clamp(max=float(schedule.ratio(1.0)))).to(u)
        density = (schedule.diffusion(t) / schedule(t)[1]) ** 2
        mass = torch.cumulative_trapezoid(density, t)
        mass = torch.cat([mass.new_zeros(1), mass])
        wanted = u * mass[-1]
        k = torch.searchsorted(mass, wanted, right=True).clamp(1, self.POINTS - 1)
        share = (wanted - mass[k - 1]) / (mass[k] - mass[k - 1])
        drawn = torch.lerp(t[k - 1], t[k], share)
        # Within an interval t is uniform: its density there is the interval's mass by its length.
        factor = mass[-1] * (t[k] - t[k - 1]) / (mass[k] - mass[k - 1])
        return drawn, factor / (1 - schedule.t_min)
