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

__all__ = ["LARGEST", "NOTHING", "Schedule"]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.rng import KeyedGenerator, normal_like

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
