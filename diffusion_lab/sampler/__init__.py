"""Samplers: from noise to an image, by many calls of a denoiser. One file a family."""

__all__ = ["DDIM", "Ancestral", "EulerMaruyama", "Sampler", "State"]

from diffusion_lab.sampler.ancestral import Ancestral
from diffusion_lab.sampler.base import Sampler, State
from diffusion_lab.sampler.ddim import DDIM
from diffusion_lab.sampler.sde import EulerMaruyama
