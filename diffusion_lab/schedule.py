r"""Noise schedules: how much of the image is left at time t, and how much noise is in it.

    q(x_t | x_0) = N(α_t x_0, σ_t² I),    t in [0, 1]; t = 0 is exactly clean, t = 1 the noisiest.

It is the solution of the forward process dx = f(t) x dt + g(t) dw with

    f(t) = d log α_t / dt,    g(t)² = d σ_t² / dt - 2 f(t) σ_t²,

and G(t) = ∫_0^t g² is known in closed form for every schedule here. What two schedules share is
the ratio r_t = σ_t / α_t, never t: `t_from_ratio` translates, and log SNR = -2 log r_t.

A DDPM has T noise increments β_0, ..., β_{T-1}. Its index i is time t = (i + 1) / T, and

    ᾱ_i = ∏_{j ≤ i} (1 - β_j),    α_t = √ᾱ_i,    σ_t = √(1 - ᾱ_i).

Between the indices log ᾱ is linear in t, which makes it a process of continuous time as well,
whose transition kernels agree with DDPM's at every index: f = -g² / 2.

Everything is computed in float64, so that neither end loses digits.

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020 (linear).
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021 (quadratic).
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 17 (cosine).
    Jabri, Fleet, Chen, "Scalable adaptive computation for iterative generation", 2022 (sigmoid).
    Hang et al., "Improved noise schedule for diffusion training", 2024 (Laplace).
    Song et al., "Score-based generative modeling through SDEs", 2021, eq. 29 to 33 (VE and VP).
    Karras et al., "Elucidating the design space of diffusion-based generative models", 2022 (EDM).
    Liu, Gong, Liu, "Flow straight and fast", 2022 (flow).
    Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2024, algorithm 1.
    Hoogeboom, Heek, Salimans, "Simple diffusion", 2023, eq. 4 (the shift with the resolution).
"""

__all__ = [
    "EDM", "VE", "VP", "Cosine", "DiscreteSchedule", "Flow", "Laplace", "Linear", "Quadratic",
    "Schedule", "Sigmoid", "SubVP",
]  # fmt: skip

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.noise import KeyedGenerator, normal_like

MAXIMAL_BETA = 0.999  # the cap of Nichol & Dhariwal: without it ᾱ reaches zero
LARGEST = 1e5  # a ratio σ / α above it is pure noise
NOTHING = -60.0  # log ᾱ of a signal that is gone: α = 1e-13, which float32 still tells from zero


class Schedule(nn.Module, ABC):
    """The noise level as a function of time.

    Attributes:
        t_min: The smallest time at which networks are trained, and at which the grids of the
            samplers end before the last step to 0.
        steps: T: a network is told the time as the index i = tT - 1.
        variance_preserving: Whether α_t² + σ_t² = 1.
    """

    t_min: float
    steps: int = 1000
    variance_preserving = False
    _place: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Tells the device that the model was moved to; not every schedule has a table.
        self.register_buffer("_place", torch.zeros(()), persistent=False)

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t, float64, of t's shape (t float64)."""

    @abstractmethod
    def drift(self, t: Tensor | float) -> Tensor:
        """Returns f(t) = d log α_t / dt, float64."""

    @abstractmethod
    def diffusion(self, t: Tensor | float) -> Tensor:
        """Returns g(t), float64."""

    @abstractmethod
    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        """Returns G(t) = ∫_0^t g(u)² du, float64."""

    @abstractmethod
    def _inverse(self, ratio: Tensor) -> Tensor:
        """The time with σ_t / α_t = r, for r within the schedule."""

    def forward(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t.

        Arguments:
            t: Time in [0, 1], any shape.

        Returns:
            Two tensors of t's shape and type (float32 for a number).
        """
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            t = torch.as_tensor(t, dtype=torch.float32)
        alpha_t, sigma_t = self.levels(t.double())
        return alpha_t.to(t), sigma_t.to(t)

    def ratio(self, t: Tensor | float) -> Tensor:
        """Returns r_t = σ_t / α_t, float64, of t's shape."""
        alpha_t, sigma_t = self.levels(torch.as_tensor(t, dtype=torch.float64))
        return sigma_t / alpha_t

    def t_from_ratio(self, ratio: Tensor | float, check: bool = True) -> Tensor:
        """Returns the time t with σ_t / α_t = r, float64: the inverse of `ratio`.

        Arguments:
            ratio: The noise level r, any shape, between 0 and that of t = 1.
            check: Whether r is held against this range, for which the device has to be waited for;
                otherwise it is cut to it.

        Raises:
            ValueError: If r is outside the schedule.
        """
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        maximum = self.ratio(1.0).to(ratio.device)
        inside = (ratio >= 0) & (ratio <= maximum * (1 + 1e-9))
        if check and not bool(inside.all()):
            raise ValueError(
                f"the noise level σ/α = {float(ratio[~inside][0]):.6g} is outside the schedule "
                f"{type(self).__name__}, which reaches from 0 to {float(maximum):.6g}"
            )
        return self._inverse(torch.minimum(ratio, maximum)).clamp(0, 1)

    def index(self, t: Tensor) -> Tensor:
        """Returns the index i = tT - 1 that a network is told, fractional between DDPM's."""
        return t * self.steps - 1

    @property
    def prior_std(self) -> float:
        """The standard deviation of the distribution that samplers start from at t = 1."""
        return 1.0 if self.variance_preserving else float(self(1.0)[1])

    def prior(
        self, shape: Sequence[int], generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        """Draws x_1 ~ N(0, s² I), from where the samplers start, float32; s is `prior_std`.

        Arguments:
            shape: The shape (B, *).
            generator: See `normal_like`.
        """
        start = normal_like(torch.empty(*shape, device=self._place.device), generator)
        return start if self.variance_preserving else self.prior_std * start

    def prior_kl(self, mean_square: float) -> float:
        """Returns KL(q(x_1 | x_0) ‖ N(0, s² I)), averaged over x_0, in bits per dimension.

        ½ (α_1² E x_0² / s² + σ_1² / s² - 1 - log(σ_1² / s²)) / log 2: what the samplers' start
        ignores of the image that is left at t = 1.

        Arguments:
            mean_square: E x_0², the mean over images and dimensions.
        """
        alpha, sigma = (
            float(c) / self.prior_std for c in self(torch.ones((), dtype=torch.float64))
        )
        nats = 0.5 * (alpha**2 * mean_square + sigma**2 - 1 - 2 * math.log(sigma))
        return nats / math.log(2)


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


class _LinearBeta(Schedule):
    """Song et al.'s SDEs with β(t) = β_min + t (β_max - β_min), and B(t) = ∫_0^t β.

    Arguments:
        beta_min: β(0), at least 0.
        beta_max: β(1), above `beta_min`.
        t_min: The smallest time of training, in (0, 1).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= beta_min < beta_max:
            raise ValueError(
                f"beta_min={beta_min} and beta_max={beta_max} are not allowed; "
                "0 <= beta_min < beta_max"
            )
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def _beta(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor | float) -> Tensor:
        """B(t)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _t_from_integral(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root).clamp(min=1e-300)  # not 0 / 0 at t = 0

    def drift(self, t: Tensor | float) -> Tensor:
        return -self._beta(t) / 2


class VP(_LinearBeta):
    """The variance-preserving SDE, f = -β/2, g = √β: α_t² = e^{-B(t)}, σ_t² = 1 - α_t².

    DDPM's linear schedule in the limit of many steps (Song et al., 2021, eq. 11 and 33).
    """

    variance_preserving = True

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._integral(t)
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def ratio(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(torch.expm1(self._integral(t)))

    def _inverse(self, ratio: Tensor) -> Tensor:
        return self._t_from_integral(torch.log1p(ratio**2))

    def diffusion(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(self._beta(t))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return self._integral(t)


class SubVP(_LinearBeta):
    """The sub-VP SDE, f = -β/2, g² = β (1 - e^{-2B}): α_t = e^{-B/2}, σ_t = 1 - e^{-B}.

    Song et al., 2021, eq. 14 and 33.
    """

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._integral(t)
        return torch.exp(-integral / 2), -torch.expm1(-integral)

    def ratio(self, t: Tensor | float) -> Tensor:
        return 2 * torch.sinh(self._integral(t) / 2)

    def _inverse(self, ratio: Tensor) -> Tensor:
        return self._t_from_integral(2 * torch.asinh(ratio / 2))

    def diffusion(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-self._beta(t) * torch.expm1(-2 * self._integral(t)))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        integral = self._integral(t)
        return integral + torch.expm1(-2 * integral) / 2


class VE(Schedule):
    """The variance-exploding SDE, f = 0: α_t = 1, σ_t² = σ_min² ((σ_max / σ_min)^{2t} - 1).

    Song et al., 2021, eq. 30 and 31. It starts from the clean image, so σ_min² is taken off what
    the paper calls σ(t)²; σ_1 is σ_max up to a factor √(1 - (σ_min / σ_max)²).

    Arguments:
        sigma_min: σ_min, above 0, on the scale of images in [-1, 1].
        sigma_max: σ_max, above `sigma_min`; about the largest distance between two images.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 348.0) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min} and sigma_max={sigma_max} are not allowed; "
                "0 < sigma_min < sigma_max"
            )
        self.sigma_min, self.growth = sigma_min, math.log(sigma_max / sigma_min)
        self.t_min = math.log(2) / (2 * self.growth)  # where σ_t is σ_min

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * torch.sqrt(torch.expm1(2 * self.growth * t))

    def _inverse(self, ratio: Tensor) -> Tensor:
        return torch.log1p((ratio / self.sigma_min) ** 2) / (2 * self.growth)

    def drift(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(torch.as_tensor(t, dtype=torch.float64))

    def diffusion(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.sigma_min * torch.exp(self.growth * t) * math.sqrt(2 * self.growth)

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return self.levels(torch.as_tensor(t, dtype=torch.float64))[1] ** 2


class EDM(Schedule):
    """Karras et al.'s σ as the time: α_t = 1, σ_t = σ_max t; networks are told log σ_t.

    Arguments:
        sigma_min: The smallest level of training and sampling, above 0.
        sigma_max: The largest, above `sigma_min`.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min} and sigma_max={sigma_max} are not allowed; "
                "0 < sigma_min < sigma_max"
            )
        self.sigma_max, self.t_min = sigma_max, sigma_min / sigma_max

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t

    def _inverse(self, ratio: Tensor) -> Tensor:
        return ratio / self.sigma_max

    def drift(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(torch.as_tensor(t, dtype=torch.float64))

    def diffusion(self, t: Tensor | float) -> Tensor:
        return self.sigma_max * torch.sqrt(2 * torch.as_tensor(t, dtype=torch.float64))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return (self.sigma_max * torch.as_tensor(t, dtype=torch.float64)) ** 2

    def index(self, t: Tensor) -> Tensor:
        return (self.steps - 1) * (1 - torch.log(t.double()) / math.log(self.t_min))


class Flow(Schedule):
    """The straight paths of flow matching: α_t = 1 - c t, σ_t = t, with c = 1 - 1e-5.

    c is not 1 so that the noise level of t = 1 is finite.

    Arguments:
        t_min: The smallest time of training, in (0, 1).
    """

    C = 1 - 1e-5

    def __init__(self, t_min: float = 1e-3) -> None:
        super().__init__()
        self.t_min = t_min

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - self.C * t, t.clone()

    def _inverse(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + self.C * ratio)

    def drift(self, t: Tensor | float) -> Tensor:
        return -self.C / (1 - self.C * torch.as_tensor(t, dtype=torch.float64))

    def diffusion(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt(2 * t / (1 - self.C * t))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return -2 * (t / self.C + torch.log1p(-self.C * t) / self.C**2)
