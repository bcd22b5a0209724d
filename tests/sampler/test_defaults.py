"""Default settings of the samplers under a network with errors at high noise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.runs import compose
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.schedule import Cosine

MEAN, STD, ERROR = 0.3, 0.25, 0.02  # of the images, and of the network
SLOW = ("annealed_langevin", "predictor_corrector")  # a thousand calls of the network
SAMPLERS = sorted(path.stem for path in Path(CONFIG_PATH, "sampler").glob("*.yaml"))


class Inexact(nn.Module):
    """The noise of N(MEAN, STD²) images, with two errors of trained networks.

    The prediction has a small bias, and cannot grow with the scale of its input, which group norms
    remove.
    """

    def __init__(self, schedule: Cosine) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        t = ((index.double() + 1) / self.schedule.steps).expand(len(x))
        alpha_t, sigma_t = (c.to(x).reshape(-1, 1, 1, 1) for c in self.schedule(t))
        std = torch.sqrt((alpha_t * STD) ** 2 + sigma_t**2)
        z = (x - alpha_t * MEAN) / std
        z = z / z.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1.1)
        return sigma_t / std * z + ERROR


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SAMPLERS]
)
def test_samples_of_an_inexact_network_are_images(name: str) -> None:
    """Unclipped, such errors are amplified 2·10⁴ times under this schedule.

    Deterministic samplers keep them, clipped, as too strong contrasts.
    """
    schedule = Cosine()
    config = compose("eval", ["task=generate", f"sampler={name}", "++paths.output_dir=out"])
    sampler = instantiate(config.sampler, "sampler")
    generator = torch.Generator().manual_seed(0)
    start = schedule.prior((16, 3, 4, 4), generator)
    denoiser = NetworkDenoiser(Inexact(schedule), schedule, Epsilon())
    samples = sampler(denoiser, start, generator=generator)
    stochastic = sampler.stochastic and name != "ddim"
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.1 if stochastic else 0.15)
    assert STD < float(samples.std()) < (0.42 if stochastic else 0.72)
    assert float(samples.abs().max()) <= 1.1
