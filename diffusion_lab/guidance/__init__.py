"""Posterior methods: from an observation to samples of p(x_0 | y). One file a method."""

__all__ = ["MMSE", "Guidance", "Guided", "Observation", "Residual", "Truncated"]

from diffusion_lab.guidance.base import Guidance, Guided, Observation
from diffusion_lab.guidance.mmse import MMSE
from diffusion_lab.guidance.residual import Residual
from diffusion_lab.guidance.truncated import Truncated
