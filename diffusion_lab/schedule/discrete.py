"""Discrete noise schedules: the T noise increments of a DDPM, log-linear between them."""

__all__ = ["Cosine", "DiscreteSchedule", "Laplace", "Linear", "Quadratic", "Sigmoid"]

import math

import torch
from torch import Tensor

from diffusion_lab.constraints import AtLeastTwo, Number, OpenUnit, Positive, checked
from diffusion_lab.schedule.base import MIN_LOG_ALPHA_BAR, Schedule, check_order

MAX_BETA = 0.999  # of Nichol & Dhariwal; without it ᾱ reaches zero


class DiscreteSchedule(Schedule):
    """A variance-preserving schedule of T discrete noise increments.

    Arguments:
        beta: The increments β_i, of shape (T,), each in (0, 1).
        zero_terminal_snr: Whether √ᾱ is shifted and scaled so that α_1 = 0 (1e-13 in practice);
            not for noise prediction, which needs a signal at t = 1.
        shift: The factor s of the noise level, r' = s r; d / 64 adapts a schedule for 64 x 64
            pixels to d x d.

    Raises:
        ValueError: If an increment is outside (0, 1).
    """

    variance_preserving = True
    log_alpha_bar: Tensor

    @checked
    def __init__(
        self, beta: Tensor, *, zero_terminal_snr: bool = False, shift: Positive = 1.0
    ) -> None:
        super().__init__()
        beta = beta.double()
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(
                f"the noise increments β of {type(self).__name__} must be in (0, 1); "
                f"they are from {beta.min():.3g} to {beta.max():.3g}"
            )
        log_alpha_bar = torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0)])
        if zero_terminal_snr:
            alpha = torch.exp(log_alpha_bar / 2)
            first = alpha[1].clone()
            alpha[1:] = (alpha[1:] - alpha[-1]) * (first / (first - alpha[-1]))
            log_alpha_bar = (2 * alpha.log()).clamp(min=MIN_LOG_ALPHA_BAR)
        if shift != 1:
            log_alpha_bar = -torch.log1p(shift**2 * torch.expm1(-log_alpha_bar))
        # Entry k is log ᾱ at t = k / T. Not persistent: it is computed from the configuration.
        self.register_buffer("log_alpha_bar", log_alpha_bar, persistent=False)
        self._cpu_table = log_alpha_bar  # stays on the CPU when the model is moved
        self.steps = len(beta)
        self.t_min = 1 / self.steps

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table's entries at both ends of t's interval, and t's position in it, in [0, 1]."""
        table = self._table(t)
        position = t.to(table.device, torch.float64) * self.steps
        left = position.floor().long().clamp(0, self.steps - 1)
        return table[left], table[left + 1], position - left

    def _table(self, value: Tensor) -> Tensor:
        """The table on the value's device: a lookup of times on the CPU needs no other device."""
        return self._cpu_table if value.device.type == "cpu" else self.log_alpha_bar

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        return torch.lerp(*self._interval(t))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
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
    """β_i increases linearly (Ho et al., 2020).

    Arguments:
        beta_min: The first increment β_0.
        beta_max: The last increment β_{T-1}, above `beta_min`.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.

    Raises:
        ValueError: If `beta_min` is not below `beta_max`.
    """

    @checked
    def __init__(
        self, beta_min: OpenUnit = 1e-4, beta_max: OpenUnit = 0.02, steps: AtLeastTwo = 1000, *,
        zero_terminal_snr: bool = False, shift: Positive = 1.0,
    ) -> None:  # fmt: skip
        check_order(beta_min=beta_min, beta_max=beta_max)
        beta = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


class Quadratic(DiscreteSchedule):
    """√β_i increases linearly (Song, Meng, Ermon, 2021, appendix D.2), also "scaled linear".

    Arguments:
        beta_min: The first increment β_0.
        beta_max: The last increment β_{T-1}, above `beta_min`.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.

    Raises:
        ValueError: If `beta_min` is not below `beta_max`.
    """

    @checked
    def __init__(
        self, beta_min: OpenUnit = 1e-4, beta_max: OpenUnit = 0.02, steps: AtLeastTwo = 1000, *,
        zero_terminal_snr: bool = False, shift: Positive = 1.0,
    ) -> None:  # fmt: skip
        check_order(beta_min=beta_min, beta_max=beta_max)
        ends = math.sqrt(beta_min), math.sqrt(beta_max)
        beta = torch.linspace(*ends, steps, dtype=torch.float64) ** 2
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


def _increments(alpha_bar: Tensor) -> Tensor:
    """The β_i of a curve ᾱ(k / T), k = 0, ..., T, capped at 0.999."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


class Cosine(DiscreteSchedule):
    """ᾱ(t) = cos²(π/2 (t + s) / (1 + s)) up to a factor (Nichol & Dhariwal, 2021, eq. 17).

    Arguments:
        s: The offset s, which keeps the first increments above zero.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    @checked
    def __init__(
        self, s: Positive = 0.008, steps: AtLeastTwo = 1000, *, zero_terminal_snr: bool = False,
        shift: Positive = 1.0,
    ) -> None:  # fmt: skip
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        beta = _increments(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2)
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


class Sigmoid(DiscreteSchedule):
    """ᾱ(t) is a segment of a sigmoid, from 1 to 0 (Jabri et al., 2022, algorithm 2).

    With S the logistic function and v(t) = S((start + t (end - start)) / τ),
    ᾱ(t) = (v(1) - v(t)) / (v(1) - v(0)).

    Arguments:
        start: The start of the segment.
        end: The end of the segment, above `start`.
        tau: The temperature τ; smaller is steeper.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.

    Raises:
        ValueError: If `start` is not below `end`.
    """

    @checked
    def __init__(
        self, start: Number = -3.0, end: Number = 3.0, tau: Positive = 1.0,
        steps: AtLeastTwo = 1000, *, zero_terminal_snr: bool = False, shift: Positive = 1.0,
    ) -> None:  # fmt: skip
        check_order(start=start, end=end)
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        v = torch.sigmoid((start + t * (end - start)) / tau)
        beta = _increments((v[-1] - v) / (v[-1] - v[0]))
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)


class Laplace(DiscreteSchedule):
    """log SNR has a Laplace(μ, b) distribution for uniform t (Hang et al., 2024, table 1).

    log SNR(t) = μ - b sgn(½ - t) log(1 - 2 |t - ½|),    ᾱ = 1 / (1 + 1 / SNR).

    Arguments:
        mu: The location μ of the log SNR.
        b: The scale b of the log SNR.
        steps: The number of steps T.
        zero_terminal_snr: See `DiscreteSchedule`.
        shift: See `DiscreteSchedule`.
    """

    @checked
    def __init__(
        self, mu: Number = 0.0, b: Positive = 0.5, steps: AtLeastTwo = 1000, *,
        zero_terminal_snr: bool = False, shift: Positive = 1.0,
    ) -> None:  # fmt: skip
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        log_snr = mu - b * torch.sign(0.5 - t) * torch.log1p(-2 * (t - 0.5).abs())
        beta = _increments(torch.sigmoid(log_snr))
        super().__init__(beta, zero_terminal_snr=zero_terminal_snr, shift=shift)
