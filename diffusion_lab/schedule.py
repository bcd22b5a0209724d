r"""Noise schedules: how much of the image is left at time t, and how much noise is in it.

    q(x_t | x_0) = N(α_t x_0, σ_t² I),    t in [0, 1]; t = 0 is exactly clean, t = 1 the noisiest.

All schedules here preserve the variance, α_t² + σ_t² = 1, and hold the T steps of a discrete DDPM
with noise increments β_0, ..., β_{T-1}. Index i of DDPM is time t = (i + 1) / T, and

    ᾱ_i = ∏_{j ≤ i} (1 - β_j),    α_t = √ᾱ_i,    σ_t = √(1 - ᾱ_i).

Between the indices log ᾱ is linear in t, which makes the schedule one of continuous time as well:
it is the forward process dx = f(t) x dt + g(t) dw with

    f(t) = d log α_t / dt,    g(t)² = d σ_t² / dt - 2 f(t) σ_t² = -2 f(t),

whose transition kernels agree with DDPM's at every index. What two schedules share is the ratio
r_t = σ_t / α_t, never t: `t_from_ratio` translates.

Everything is computed in float64 from log ᾱ, so that neither end loses digits.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020 (linear).
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 17 (cosine).
    Jabri, Fleet, Chen, "Scalable adaptive computation for iterative generation", 2022 (sigmoid).
    Song et al., "Score-based generative modeling through SDEs", 2021, eq. 29 (f and g).
"""

__all__ = ["Cosine", "Linear", "Schedule", "Sigmoid"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.noise import KeyedGenerator, normal_like

MAXIMAL_BETA = 0.999  # the cap of Nichol & Dhariwal: without it ᾱ reaches zero


class Schedule(nn.Module):
    """A variance-preserving schedule made of T discrete noise increments.

    Arguments:
        beta: The increments β_i, of shape (T,), each in (0, 1).

    Raises:
        ValueError: If an increment is outside (0, 1).
    """

    def __init__(self, beta: Tensor) -> None:
        super().__init__()
        beta = beta.double()
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(
                f"the noise increments β of {type(self).__name__} must lie in (0, 1); "
                f"they run from {beta.min():.3g} to {beta.max():.3g}"
            )
        log_alpha_bar = torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0)])
        # Entry k holds log ᾱ at t = k / T. Not persistent: the configuration makes it again.
        self.register_buffer("log_alpha_bar", log_alpha_bar, persistent=False)

    @property
    def steps(self) -> int:
        """The number of discrete steps, T."""
        return len(self.log_alpha_bar) - 1

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table's entries at both ends of t's interval, and t's place in it, in [0, 1]."""
        position = t.to(self.log_alpha_bar.device, torch.float64) * self.steps
        left = position.floor().long().clamp(0, self.steps - 1)
        return self.log_alpha_bar[left], self.log_alpha_bar[left + 1], position - left

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        return torch.lerp(*self._interval(t))

    def forward(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t.

        Arguments:
            t: Time in [0, 1], any shape.

        Returns:
            Two tensors of t's shape and type (float32 for a number).
        """
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            t = torch.as_tensor(t, dtype=torch.float32)
        log_alpha_bar = self._log_alpha_bar(t)
        alpha_t = torch.exp(log_alpha_bar / 2)
        sigma_t = torch.sqrt(torch.expm1(log_alpha_bar).abs())  # abs: +0 at t = 0, not -0
        return alpha_t.to(t), sigma_t.to(t)

    def ratio(self, t: Tensor | float) -> Tensor:
        """Returns r_t = σ_t / α_t = √(1/ᾱ - 1), float64, of t's shape."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt(torch.expm1(-self._log_alpha_bar(t)).abs())

    def t_from_ratio(self, ratio: Tensor | float) -> Tensor:
        """Returns the time t with σ_t / α_t = r, float64: the inverse of `ratio`.

        Arguments:
            ratio: The noise level r, any shape, between 0 and that of t = 1.

        Raises:
            ValueError: If r is outside the schedule.
        """
        ratio = torch.as_tensor(ratio, dtype=torch.float64, device=self.log_alpha_bar.device)
        maximum = float(self.ratio(1.0))
        if not bool(((ratio >= 0) & (ratio <= maximum * (1 + 1e-12))).all()):
            raise ValueError(
                f"the noise level σ/α = {ratio.tolist()} is outside the schedule "
                f"{type(self).__name__}, which reaches from 0 to {maximum:.4g}"
            )
        wanted = -torch.log1p(ratio**2)  # log ᾱ = -log(1 + r²)
        table = self.log_alpha_bar
        left = torch.searchsorted(-table, -wanted.contiguous(), right=True) - 1
        left = left.clamp(0, self.steps - 1)
        return (left + (wanted - table[left]) / (table[left + 1] - table[left])) / self.steps

    def index(self, t: Tensor) -> Tensor:
        """Returns DDPM's index i = tT - 1 of the times t, fractional between the indices."""
        return t * self.steps - 1

    def drift(self, t: Tensor | float) -> Tensor:
        """Returns f(t) = d log α_t / dt, float64; within an interval it is constant."""
        left, right, _ = self._interval(torch.as_tensor(t, dtype=torch.float64))
        return (right - left) * (self.steps / 2)

    def diffusion(self, t: Tensor | float) -> Tensor:
        """Returns g(t) = √(-2 f(t)), float64."""
        return torch.sqrt(-2 * self.drift(t))

    def prior(
        self, shape: Sequence[int], generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        """Draws x_T ~ N(0, I), from where the samplers start, float32.

        Arguments:
            shape: The shape (B, *).
            generator: See `normal_like`.
        """
        device = self.log_alpha_bar.device
        return normal_like(torch.empty(*shape, device=device), generator)


class Linear(Schedule):
    """β_i grows linearly (Ho et al., 2020).

    Arguments:
        beta_min: The first increment β_0, in (0, 1).
        beta_max: The last increment β_{T-1}, in (0, 1).
        steps: The number of steps T.
    """

    def __init__(self, beta_min: float = 1e-4, beta_max: float = 0.02, steps: int = 1000) -> None:
        super().__init__(torch.linspace(beta_min, beta_max, steps, dtype=torch.float64))


def _increments(alpha_bar: Tensor) -> Tensor:
    """The β_i of a curve ᾱ(k / T), k = 0, ..., T, capped at 0.999."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAXIMAL_BETA)


class Cosine(Schedule):
    """ᾱ(t) = cos²(π/2 (t + s) / (1 + s)) up to a factor (Nichol & Dhariwal, 2021, eq. 17).

    Arguments:
        s: The offset s, which keeps the first increments from vanishing; above 0.
        steps: The number of steps T.
    """

    def __init__(self, s: float = 0.008, steps: int = 1000) -> None:
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        super().__init__(_increments(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2))


class Sigmoid(Schedule):
    """ᾱ(t) falls from 1 to 0 as a piece of a sigmoid (Jabri et al., 2022, algorithm 2).

    With S the logistic function and v(t) = S((start + t (end - start)) / τ),
    ᾱ(t) = (v(1) - v(t)) / (v(1) - v(0)).

    Arguments:
        start: Where the piece begins.
        end: Where it ends; above `start`.
        tau: The temperature τ, above 0; smaller is steeper.
        steps: The number of steps T.
    """

    def __init__(
        self, start: float = -3.0, end: float = 3.0, tau: float = 1.0, steps: int = 1000
    ) -> None:
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        v = torch.sigmoid((start + t * (end - start)) / tau)
        super().__init__(_increments((v[-1] - v) / (v[-1] - v[0])))
