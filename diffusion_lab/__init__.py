"""Diffusion priors and posterior sampling, on PyTorch Lightning and Hydra."""

__all__ = ["Denoiser", "load_run"]

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.runs import load_run
