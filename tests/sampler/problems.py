"""The mixture that is the test problem of all samplers, and its exact denoisers."""

import torch
from torch import Tensor

from diffusion_lab.analytic import GaussianMixture
from diffusion_lab.schedule import VE, VP, Cosine, Linear, Schedule

D, COUNT = 8, 4096
SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "vp": VP(), "ve": VE()}


def make_mixture() -> GaussianMixture:
    """Three well-separated components with narrow, oblique covariances.

    The standard deviations are from 0.1 to 0.45.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, D, D + 1, generator=generator, dtype=torch.float64)
    means = 2 * normal[..., -1] / normal[..., -1].norm(dim=1, keepdim=True)
    axes, _ = torch.linalg.qr(normal[..., :-1])
    variances = torch.logspace(-2, -0.7, D, dtype=torch.float64)
    covariances = axes @ torch.diag(variances) @ axes.mT
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(weights, means, covariances)


MIXTURE = make_mixture()


def start(schedule: Schedule, count: int = COUNT, seed: int = 1) -> tuple[Tensor, torch.Generator]:
    """The initial noise in float64, and its generator for the noise of the sampler."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, D, generator=generator, dtype=torch.float64)
    return schedule.prior_std * noise, generator
