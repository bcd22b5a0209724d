"""Priors known in closed form, and what follows from them exactly."""

__all__ = ["Gaussian", "GaussianMixture", "MixtureDenoiser"]

from diffusion_lab.analytic.gaussian_mixture import Gaussian, GaussianMixture, MixtureDenoiser
