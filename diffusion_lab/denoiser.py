r"""Denoisers, x_t, t -> E[x_0 | x_t]: the interface used by samplers and posterior methods.

It is independent of the parameterization of the network, and determines (Tweedie)

    ε̂(x_t, t) = (x_t - α_t x̂) / σ_t,    ∇ log p(x_t) = -ε̂ / σ_t = (α_t x̂ - x_t) / σ_t².

A network may also learn the variance of the reverse steps, see `transition`: half of its output is
then a fraction for each element of x_t, which `with_variance` returns.
"""

__all__ = ["ClassifierFree", "Clipped", "Denoiser", "NetworkDenoiser", "Rescheduled"]

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffusion_lab.constraints import NonNegative, checked
from diffusion_lab.parameterization import Parameterization
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast


def _for_each(number: Tensor, x: Tensor) -> Tensor:
    """A number of shape () or (B,) expanded to shape (B,), on x's device."""
    number = number.to(x.device) if number.ndim else number  # shape (): added without a copy
    return torch.zeros(len(x), dtype=number.dtype, device=x.device) + number


class Denoiser(nn.Module, ABC):
    """Estimator of the clean state x_0 given the noisy x_t.

    Arguments:
        schedule: The schedule of α_t and σ_t.
    """

    if TYPE_CHECKING:  # nn.Module's returns Any

        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor: ...

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns E[x_0 | x_t].

        Arguments:
            x_t: The noisy state, of shape (B, *).
            t: Its time in (0, 1], of shape () or (B,).
        """

    def with_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns E[x_0 | x_t] and the variance fraction f of the reverse step.

        Both are from one call of the network. f has the shape and type of x_t, see `transition`.
        It is None by default, which means that no variance was learned.

        Arguments:
            x_t: See `forward`.
            t: See `forward`.
        """
        return self(x_t, t), None

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns ∇ log p(x_t) = (α_t E[x_0 | x_t] - x_t) / σ_t², of shape (B, *)."""
        alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t))
        return (alpha_t * self(x_t, t) - x_t) / sigma_t**2


class NetworkDenoiser(Denoiser):
    """A network with its schedule and parameterization.

    The network may run in reduced precision, by autocast or by the type of its weights; x_t and
    the estimate keep their type. Its input has the type of its first parameter.

    Arguments:
        network: Maps (x_t, i), with DDPM's index i of shape (B,), to a prediction of x_t's shape.
            A network with a true attribute `learn_variance` returns twice as many channels: the
            prediction, and o in [-1, 1] for the variance fraction f = (o + 1) / 2.
        schedule: The schedule that it was trained with.
        parameterization: The parameterization that it was trained with.
        label: The class label, of shape () or (B,), for a class-conditional network; None for the
            unconditional prediction.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        label: Tensor | int | None = None,
    ) -> None:
        super().__init__(schedule)
        self.network = network
        self.parameterization = parameterization
        self.label = label

    def outputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the network's prediction at x_t and f, or None, in x_t's type."""
        if self.parameterization.scales_input(self.schedule):
            alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t))
            x_t = self.parameterization.input_scale(alpha_t, sigma_t) * x_t
        # Networks are not trained below t = 1/T, where there is almost no noise.
        index = self.schedule.index(t).clamp(min=0)
        index = _for_each(index.float(), x_t)
        parameter = next(self.network.parameters(), x_t)
        labels = () if self.label is None else (_for_each(torch.as_tensor(self.label), x_t),)
        output: Tensor = self.network(x_t.to(parameter.dtype), index, *labels).to(x_t.dtype)
        if not getattr(self.network, "learn_variance", False):
            return output, None
        output, o = output.chunk(2, dim=1)
        return output, (o + 1) / 2

    def with_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t))
        output, fraction = self.outputs(x_t, t)
        return self.parameterization.denoised(output, x_t, alpha_t, sigma_t), fraction

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.with_variance(x_t, t)[0]


class ClassifierFree(Denoiser):
    """Classifier-free guidance: extrapolation from the unconditional to the conditional estimate.

    x̂ = x̂_∅ + w (x̂_c - x̂_∅); w = 1 is the conditional denoiser. A larger w gives samples that are
    more typical of their class and less diverse than those of p(x_0 | c). A learned variance is
    that of the conditional denoiser.

    Source:
        Ho, Salimans, "Classifier-free diffusion guidance", 2022, eq. 6 (their w is w - 1 here).

    Arguments:
        conditional: x̂_c, E[x_0 | x_t, c].
        unconditional: x̂_∅, E[x_0 | x_t], under the same schedule.
        guidance_scale: w.
    """

    @checked
    def __init__(
        self, conditional: Denoiser, unconditional: Denoiser, guidance_scale: NonNegative
    ) -> None:
        super().__init__(conditional.schedule)
        self.conditional, self.unconditional = conditional, unconditional
        self.guidance_scale = guidance_scale

    def with_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        denoised, fraction = self.conditional.with_variance(x_t, t)
        if self.guidance_scale != 1:
            denoised = torch.lerp(self.unconditional(x_t, t), denoised, self.guidance_scale)
        return denoised, fraction

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.with_variance(x_t, t)[0]


class Rescheduled(Denoiser):
    """A denoiser under another schedule.

    Noisy states with the same ratio σ / α have the same information about x_0. With the time t' at
    which the denoiser's own schedule has the ratio of t,

        E[x_0 | x_t] = E[x_0 | x'_{t'} = α'_{t'} / α_t x_t].

    A learned variance is not available, as v depends on the schedule. `forward` raises ValueError
    at a level outside the denoiser's own schedule.

    Arguments:
        denoiser: The denoiser.
        schedule: The new schedule.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        own = self.denoiser.schedule
        t_own = own.t_from_ratio(self.schedule.ratio(t))
        factor = own(t_own)[0] / self.schedule(t.double())[0]
        return self.denoiser(broadcast(factor, x_t) * x_t, t_own)


class Clipped(Denoiser):
    """A denoiser with its estimate clipped to [-1, 1], the range of pixels.

    Samplers compute ε̂ and the score from the clipped estimate.

    Arguments:
        denoiser: The denoiser.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser

    def with_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        denoised, fraction = self.denoiser.with_variance(x_t, t)
        return denoised.clamp(-1, 1), fraction

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(x_t, t).clamp(-1, 1)
