r"""Denoisers: x_t, t -> E[x_0 | x_t]. What samplers and posterior methods speak to.

A denoiser knows nothing of how its network was trained: the parameterization turns the output into
E[x_0 | x_t], from which follow (Tweedie)

    ε̂(x_t, t) = (x_t - α_t x̂) / σ_t,    ∇ log p(x_t) = -ε̂ / σ_t = (α_t x̂ - x_t) / σ_t².

A network may have learned the variance of the reverse steps, too, see `reverse.py`: then half of
its output is a share for each number of the image, of which only `with_share` speaks.
"""

__all__ = ["ClassifierFree", "Clipped", "Denoiser", "NetworkDenoiser", "Rescheduled"]

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lab.parameterization import Parameterization
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast


def _for_each(number: Tensor, x: Tensor) -> Tensor:
    """A number of shape () or (B,) for each image of x, of shape (B,), on x's device."""
    number = number.to(x.device) if number.ndim else number  # one is added by value, see above
    return torch.zeros(len(x), dtype=number.dtype, device=x.device) + number


class Denoiser(nn.Module, ABC):
    """Estimates the clean image from a noisy one.

    Arguments:
        schedule: The schedule that α_t and σ_t are of.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns E[x_0 | x_t].

        Arguments:
            x_t: The noisy image, of shape (B, *).
            t: Its time in (0, 1], of shape () or (B,).
        """

    def with_share(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns E[x_0 | x_t], and the share of the larger variance in the reverse step's.

        Both by one call of the network; the share is of x_t's shape and type, and None where no
        variance was learned. A denoiser that changes the estimate of another need not know of it.

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
    """A network under the schedule and parameterization that it was trained with.

    The network may run in reduced precision, under autocast or by the type of its weights; x_t and
    the estimate stay as they are. It gets x_t in the type of its first parameter.

    Arguments:
        network: Maps (x_t, i), with DDPM's index i of shape (B,), to a prediction like x_t. One
            with a true attribute `learn_variance` gives twice as many channels: the prediction's,
            and then o in [-1, 1] for the share (o + 1) / 2.
        schedule: Its schedule.
        parameterization: What it predicts.
        label: The class of the images, for a network that knows classes, of shape () or (B,); none
            if None.
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
        """Returns the network's prediction at x_t and its share, if any, in x_t's type."""
        if self.parameterization.scales(self.schedule):
            alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t))
            x_t = self.parameterization.scale(alpha_t, sigma_t) * x_t
        # Below t = 1/T a network was never trained; there is hardly any noise there either.
        index = self.schedule.index(t).clamp(min=0)
        index = _for_each(index.float(), x_t)
        parameter = next(self.network.parameters(), x_t)
        labels = () if self.label is None else (_for_each(torch.as_tensor(self.label), x_t),)
        output = self.network(x_t.to(parameter.dtype), index, *labels).to(x_t.dtype)
        if not getattr(self.network, "learn_variance", False):
            return output, None
        output, o = output.chunk(2, dim=1)
        return output, (o + 1) / 2

    def output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the network's prediction at x_t, in x_t's type."""
        return self.outputs(x_t, t)[0]

    def with_share(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t))
        output, share = self.outputs(x_t, t)
        return self.parameterization.denoised(output, x_t, alpha_t, sigma_t), share

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.with_share(x_t, t)[0]


class ClassifierFree(Denoiser):
    """Classifier-free guidance: away from what a denoiser says of any image.

    x̂ = x̂_∅ + w (x̂_c - x̂_∅); w = 1 is the conditional denoiser. A larger w gives images that are
    more typical of their class and less varied: no longer samples of p(x_0 | c). A learned
    variance is that of the conditional one.

    Source:
        Ho, Salimans, "Classifier-free diffusion guidance", 2022, eq. 6 (their w is w - 1 here).

    Arguments:
        conditional: x̂_c, E[x_0 | x_t, c].
        unconditional: x̂_∅, E[x_0 | x_t], under the same schedule.
        strength: w, at least 0.
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, strength: float) -> None:
        super().__init__(conditional.schedule)
        self.conditional, self.unconditional = conditional, unconditional
        self.strength = strength

    def with_share(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        denoised, share = self.conditional.with_share(x_t, t)
        if self.strength != 1:
            denoised = torch.lerp(self.unconditional(x_t, t), denoised, self.strength)
        return denoised, share

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.with_share(x_t, t)[0]


class Rescheduled(Denoiser):
    """Another denoiser under a schedule that is not its own: any prior under any schedule.

    Two noisy images with one ratio σ / α tell the same of x_0. With t' where the denoiser's own
    schedule has the ratio of t,

        E[x_0 | x_t] = E[x_0 | x'_{t'} = α'_{t'} / α_t x_t].

    A learned variance stays behind: its larger end v is another in every schedule.

    Arguments:
        denoiser: The denoiser.
        schedule: The schedule that it is asked under.

    Raises:
        ValueError: If asked for a level outside the denoiser's own schedule.
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
    """Clips the estimate of another denoiser to the range of pixels.

    Whatever a sampler derives from the estimate (ε̂, the score) is derived from the clipped one.

    Arguments:
        denoiser: The denoiser.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser

    def with_share(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        denoised, share = self.denoiser.with_share(x_t, t)
        return denoised.clamp(-1, 1), share

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(x_t, t).clamp(-1, 1)
