r"""Noise schedules: signal level α_t and noise level σ_t as functions of time.

    q(x_t | x_0) = N(α_t x_0, σ_t² I),    t in [0, 1]; t = 0 is exactly clean, t = 1 the noisiest.

This is the marginal of the forward process dx = f(t) x dt + g(t) dw with

    f(t) = d log α_t / dt,    g(t)² = d σ_t² / dt - 2 f(t) σ_t²,

and G(t) = ∫_0^t g² has a closed form for every schedule here. Two schedules are matched by the
ratio r_t = σ_t / α_t, never by t, see `t_from_ratio`; log SNR = -2 log r_t.

A DDPM has T noise increments β_0, ..., β_{T-1}. Its index i is the time t = (i + 1) / T, and

    ᾱ_i = ∏_{j ≤ i} (1 - β_j),    α_t = √ᾱ_i,    σ_t = √(1 - ᾱ_i).

Between the indices log ᾱ is linear in t. This defines a continuous-time process with f = -g² / 2,
whose transition kernels agree with DDPM's at every index.

All values are computed in float64, so that neither end loses digits.

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

__all__ = ["MAX_RATIO", "MIN_LOG_ALPHA_BAR", "Schedule", "check_order"]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffusion_lab.rng import KeyedGenerator, normal_like

MAX_RATIO = 1e5  # x_t of a larger σ / α is pure noise
MIN_LOG_ALPHA_BAR = -60.0  # α = 1e-13, which is not zero in float32


class Schedule(nn.Module, ABC):
    """Noise schedule in continuous time t in [0, 1].

    Attributes:
        t_min: The smallest training time; the samplers' time grids end there before the last step
            to 0.
        steps: T; the network's time input is the index i = tT - 1.
        variance_preserving: Whether α_t² + σ_t² = 1.
    """

    t_min: float
    steps: int = 1000
    variance_preserving = False
    _device_marker: Tensor

    if TYPE_CHECKING:  # nn.Module's returns Any

        def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]: ...

    def __init__(self) -> None:
        super().__init__()
        # Its device is that of the model; not every schedule has a table.
        self.register_buffer("_device_marker", torch.zeros(()), persistent=False)

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t, float64, of the shape of t, which is float64."""

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
        """The time t with σ_t / α_t = r, for r in the range of the schedule."""

    def forward(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t.

        Arguments:
            t: Time in [0, 1], any shape.

        Returns:
            Two tensors of t's shape and type (float32 for a number).
        """
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            t = torch.as_tensor(t, dtype=torch.float32)
        alpha_t, sigma_t = self.alpha_sigma(t.double())
        return alpha_t.to(t), sigma_t.to(t)

    def ratio(self, t: Tensor | float) -> Tensor:
        """Returns r_t = σ_t / α_t, float64, of t's shape."""
        alpha_t, sigma_t = self.alpha_sigma(torch.as_tensor(t, dtype=torch.float64))
        return sigma_t / alpha_t

    def ratio_range(self) -> tuple[float, float]:
        """Returns the lowest and the highest noise level: r at t_min and at t = 1."""
        ends = torch.tensor([self.t_min, 1.0], dtype=torch.float64)
        low, high = self.ratio(ends).tolist()
        return low, high

    def t_from_ratio(self, ratio: Tensor | float, check: bool = True) -> Tensor:
        """Returns the time t with σ_t / α_t = r, float64: the inverse of `ratio`.

        Arguments:
            ratio: The noise level r, any shape, between 0 and that of t = 1.
            check: Whether r outside this range is an error, which needs a synchronization with
                the device; otherwise r is clamped.

        Raises:
            ValueError: If r is outside the range.
        """
        ratio = torch.as_tensor(ratio, dtype=torch.float64)
        maximum = self.ratio(1.0).to(ratio.device)
        inside = (ratio >= 0) & (ratio <= maximum * (1 + 1e-9))
        if check and not bool(inside.all()):
            raise ValueError(
                f"the noise level σ/α = {float(ratio[~inside][0]):.6g} is outside the schedule "
                f"{type(self).__name__}, whose range is 0 to {float(maximum):.6g}"
            )
        return self._inverse(torch.minimum(ratio, maximum)).clamp(0, 1)

    def index(self, t: Tensor) -> Tensor:
        """Returns the index i = tT - 1, the network's time input; an integer at DDPM's times."""
        return t * self.steps - 1

    @property
    def prior_std(self) -> float:
        """The standard deviation s of x_1, the start of the samplers."""
        return 1.0 if self.variance_preserving else float(self(1.0)[1])

    def prior(
        self, shape: Sequence[int], generator: KeyedGenerator | torch.Generator | None = None
    ) -> Tensor:
        """Draws x_1 ~ N(0, s² I), the start of the samplers, float32; s is `prior_std`.

        Arguments:
            shape: The shape (B, *).
            generator: See `normal_like`.
        """
        start = normal_like(torch.empty(*shape, device=self._device_marker.device), generator)
        return start if self.variance_preserving else self.prior_std * start

    def prior_kl(self, mean_square: float) -> float:
        """Returns KL(q(x_1 | x_0) ‖ N(0, s² I)), averaged over x_0, in bits per dimension.

        ½ (α_1² E x_0² / s² + σ_1² / s² - 1 - log(σ_1² / s²)) / log 2: the information about x_0
        in x_1, which the start of the samplers ignores.

        Arguments:
            mean_square: E x_0², the mean over images and dimensions.
        """
        alpha, sigma = (
            float(c) / self.prior_std for c in self(torch.ones((), dtype=torch.float64))
        )
        nats = 0.5 * (alpha**2 * mean_square + sigma**2 - 1 - 2 * math.log(sigma))
        return nats / math.log(2)


def check_order(**ends: float) -> None:
    """Raises ValueError unless the first of two named arguments is below the second."""
    (low, low_value), (high, high_value) = ends.items()
    if not low_value < high_value:
        raise ValueError(f"{low}={low_value} must be below {high}={high_value}")
