"""LightningModule, learning-rate schedules and post-hoc EMA."""

__all__ = ["DiffusionModule"]

from diffusion_lab.training.module import DiffusionModule
