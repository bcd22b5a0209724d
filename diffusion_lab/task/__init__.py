"""Evaluations of a trained prior."""

__all__ = ["FID", "Denoise", "Generate", "Interpolate", "Likelihood", "Restore", "Task"]

from diffusion_lab.task.base import Task
from diffusion_lab.task.fid import FID
from diffusion_lab.task.generate import Generate
from diffusion_lab.task.interpolate import Interpolate
from diffusion_lab.task.likelihood import Likelihood
from diffusion_lab.task.restore import Denoise, Restore
