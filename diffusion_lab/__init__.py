"""Diffusion priors and posterior sampling, on PyTorch Lightning and Hydra."""

__all__ = ["Denoiser", "load_run"]
__version__ = "0.1.0"  # the only place that states it

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.deprecated import install
from diffusion_lab.runs import load_run

install()
