"""Discrete noise schedules: the T noise increments of a DDPM, log-linear in between."""

__all__ = ["Cosine", "DiscreteSchedule", "Laplace", "Linear", "Quadratic", "Sigmoid"]

import math

import torch
from torch import Tensor

from diffusion_lab.schedule.base import NOTHING, Schedule

MAXIMAL_BETA = 0.999  # the cap of Nichol & Dhariwal: without it ᾱ reaches zero


class DiscreteSchedule(Schedule):
    """A variance-preserving schedule made of T discrete noise increments.

    Arguments:
        beta: The increments β_i, of shape (T,), each in (0, 1).
        zero_terminal_snr: Whether √ᾱ is moved and stretched so that no image is left at t = 1.
        shift: The factor s of the noise level, r' = s r; d / 64 for images of d x d pixels makes
            the schedule of 64 x 64 pixels fit them.

    Raises:
        ValueError: If an increment is outside (0, 1), or the shift is not above 0.
    """

    variance_preserving = True
    log_alpha_bar: Tensor

    def __init__(
        self, beta: Tensor, *, zero_terminal_snr: bool = False, shift: float = 1.0
    ) -> None:
        super().__init__()
        beta = beta.double()
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(
                f"the noise increments β of {type(self).__name__} must lie in (0, 1); "
                f"they run from {beta.min():.3g} to {beta.max():.3g}"
            )
        if not shift > 0:
            raise ValueError(f"shift={shift} is not allowed; it is above 0")
        log_alpha_bar = torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0)])
        if zero_terminal_snr:
            alpha = torch.exp(log_alpha_bar / 2)
            first = alpha[1].clone()
            alpha[1:] = (alpha[1:] - alpha[-1]) * (first / (first - alpha[-1]))
            log_alpha_bar = (2 * alpha.log()).clamp(min=NOTHING)
        if shift != 1:
            log_alpha_bar = -torch.log1p(shift**2 * torch.expm1(-log_alpha_bar))
        # Entry k holds log ᾱ at t = k / T. Not persistent: the configuration makes it again.
        self.register_buffer("log_alpha_bar", log_alpha_bar, persistent=False)
        self.on_cpu = log_alpha_bar  # stays there when the model is moved
        self.steps = len(beta)
        self.t_min = 1 / self.steps

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table's entries at both ends of t's interval, and t's place in it, in [0, 1]."""
        table = self._table(t)
        position = t.to(table.device, torch.float64) * self.steps
        left = position.floor().long().clamp(0, self.steps - 1)
        return table[left], table[left + 1], position - left

    def _table(self, value: Tensor) -> Tensor:
        """The table where the value is: times on the CPU are looked up without the device."""
        return self.on_cpu if value.device.type == "cpu" else self.log_alpha_bar

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        return torch.lerp(*self._interval(t))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self._log_alpha_bar(t)
        alpha_t = torch.exp(log_alpha_bar / 2)
        return alpha_t, torch.sqrt(torch.expm1(log_alpha_bar).abs())  # abs: +0 at t = 0, not -0

    def ratio(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt(torch.expm1(-self._log_alpha_bar(t)).abs())

    def _inverse(self, ratio: Tensor) -> Tensor:
        table = self._table(ratio)
        wanted = -torch.log1p(ratio.to(table.device) ** 2)  # log ᾱ = -log(1 + r²)
        left = torch.searchsorted(-table, -wanted.contiguous(), right=True) - 1
        left = left.clamp(0, self.steps - 1)
        return (left + (wanted - table[left]) / (table[left + 1] - table[left])) / self.steps

    def drift(self, t: Tensor | float) -> Tensor:
        left, right, _ = self._interval(torch.as_tensor(t, dtype=torch.float64))
        return (right - left) * (self.steps / 2)

    def diffusion(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-2 * self.drift(t))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return -self._log_alpha_bar(torch.as_tensor(t, dtype=torch.float64))


class Linear(DiscreteSchedule):
    """β_i grows linearly (Ho et al., 2020).

    Arguments:
        beta_min: The first increment β_0, in (0, 1).
        beta_max: The last increment β_{T-1}, in (0, 1).
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    def __init__(
        self, beta_min: float = 1e-4, beta_max: float = 0.02, steps: int = 1000, *,
        zero_terminal_snr: bool = False, shift: float = 1.0,
    ) -> None:  # fmt: skip
        beta = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


class Quadratic(DiscreteSchedule):
    """√β_i grows linearly (Song, Meng, Ermon, 2021, appendix D.2; "scaled linear" elsewhere).

    Arguments:
        beta_min: The first increment β_0, in (0, 1).
        beta_max: The last increment β_{T-1}, in (0, 1).
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    def __init__(
        self, beta_min: float = 1e-4, beta_max: float = 0.02, steps: int = 1000, *,
        zero_terminal_snr: bool = False, shift: float = 1.0,
    ) -> None:  # fmt: skip
        ends = math.sqrt(beta_min), math.sqrt(beta_max)
        beta = torch.linspace(*ends, steps, dtype=torch.float64) ** 2
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


def _increments(alpha_bar: Tensor) -> Tensor:
    """The β_i of a curve ᾱ(k / T), k = 0, ..., T, capped at 0.999."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAXIMAL_BETA)


class Cosine(DiscreteSchedule):
    """ᾱ(t) = cos²(π/2 (t + s) / (1 + s)) up to a factor (Nichol & Dhariwal, 2021, eq. 17).

    Arguments:
        s: The offset s, which keeps the first increments from vanishing; above 0.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    def __init__(
        self, s: float = 0.008, steps: int = 1000, *, zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> None:  # fmt: skip
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        beta = _increments(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2)
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


class Sigmoid(DiscreteSchedule):
    """ᾱ(t) falls from 1 to 0 as a piece of a sigmoid (Jabri et al., 2022, algorithm 2).

    With S the logistic function and v(t) = S((start + t (end - start)) / τ),
    ᾱ(t) = (v(1) - v(t)) / (v(1) - v(0)).

    Arguments:
        start: Where the piece begins.
        end: Where it ends; above `start`.
        tau: The temperature τ, above 0; smaller is steeper.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    def __init__(
        self, start: float = -3.0, end: float = 3.0, tau: float = 1.0, steps: int = 1000, *,
        zero_terminal_snr: bool = False, shift: float = 1.0,
    ) -> None:  # fmt: skip
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        v = torch.sigmoid((start + t * (end - start)) / tau)
        beta = _increments((v[-1] - v) / (v[-1] - v[0]))
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


class Laplace(DiscreteSchedule):
    """log SNR is distributed as Laplace(μ, b) for uniform t (Hang et al., 2024, table 1).

    log SNR(t) = μ - b sgn(½ - t) log(1 - 2 |t - ½|),    ᾱ = 1 / (1 + 1 / SNR).

    Arguments:
        mu: The centre μ of the log SNR, where most times are spent.
        b: Its spread b, above 0.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    def __init__(
        self, mu: float = 0.0, b: float = 0.5, steps: int = 1000, *,
        zero_terminal_snr: bool = False, shift: float = 1.0,
    ) -> None:  # fmt: skip
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        log_snr = mu - b * torch.sign(0.5 - t) * torch.log1p(-2 * (t - 0.5).abs())
        beta = _increments(torch.sigmoid(log_snr))
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)
