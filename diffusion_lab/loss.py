r"""Losses: how the noise level is drawn in training, and what an error weighs there.

Source:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 14.
"""

__all__ = ["Simple"]

from torch import Tensor, nn

from diffusion_lab.noise import KeyedGenerator
from diffusion_lab.schedule import Schedule


class Simple(nn.Module):
    """L_simple = E |target - output|², t uniform over DDPM's T indices, all weights one."""

    def sample_t(self, generator: KeyedGenerator, schedule: Schedule) -> Tensor:
        """Draws t = k / T, k uniform in {1, ..., T}, float64, of shape (B,)."""
        u = generator.uniform()
        return ((u.double() * schedule.steps).floor() + 1) / schedule.steps

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of each image: the mean squared error over its numbers, shape (B,)."""
        return (output.float() - target).square().flatten(1).mean(1)
