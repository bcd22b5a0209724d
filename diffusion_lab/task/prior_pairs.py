"""Pairs (x_t, x_0) drawn from the reverse chain of a prior."""

__all__ = ["sample_prior_pairs"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import Ancestral, State
from diffusion_lab.sampler.time_grid import TimeGrid
from diffusion_lab.schedule import Schedule

STEPS = 200  # of the chain, above t and below


def sample_prior_pairs(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    t: float,
    seed: int,
    index: Tensor,
    clip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draws x_t, and x_0 given x_t, from the prior's own reverse chain.

    The prior is exact for these pairs by construction: any error of a sampler of p(x_0 | x_t) is
    the sampler's, not the network's.

    Arguments:
        denoiser: The prior.
        shape: The shape of one image.
        t: The time t in (0, 1].
        seed: Seed of the draws.
        index: Numbers of the images, of shape (G,).
        clip: Whether the estimates of x_0 above t are clipped to [-1, 1].

    Returns:
        x_t and x_0, of shape (G, *).
    """
    generator = KeyedGenerator(make_key(seed, "model pair", index))
    start = denoiser.schedule.prior((len(index), *shape), generator)
    reached: list[Tensor] = []

    def keep(state: State) -> None:
        if state.t == t:
            reached.append(state.x_t)

    # At high noise the error of a network can exceed the range of x_0.
    upper = Ancestral(STEPS + 1, variance="large", grid=_Through(t), clip=clip)
    upper(denoiser, start, generator=generator, callback=keep)
    lower = Ancestral(STEPS, variance="large")
    return reached[0], lower(denoiser, reached[0], t_start=t, generator=generator)


class _Through(TimeGrid):
    """All steps but the last lead from t_start to a time t; the last leads from t to 0."""

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        upper = torch.linspace(t_start, self.t, steps, dtype=torch.float64)
        return torch.cat([upper, upper.new_zeros(1)])
