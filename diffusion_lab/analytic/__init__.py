"""Analytic priors with closed-form denoisers and posteriors."""

__all__ = [
    "Atoms", "Gaussian", "GaussianMixture", "MixtureDenoiser", "damped_spring",
    "trajectory",
]  # fmt: skip

from diffusion_lab.analytic.atoms import Atoms
from diffusion_lab.analytic.gaussian_mixture import Gaussian, GaussianMixture, MixtureDenoiser
from diffusion_lab.analytic.trajectory import damped_spring, trajectory
