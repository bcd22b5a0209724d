"""Training: the Lightning module, learning-rate schedules, post-hoc averages."""

__all__ = ["DiffusionModule"]

from diffusion_lab.training.module import DiffusionModule
