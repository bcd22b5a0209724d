"""Noise schedules, discrete and continuous."""

__all__ = [
    "EDM", "VE", "VP", "Cosine", "DiscreteSchedule", "Flow", "Laplace", "Linear", "Quadratic",
    "Schedule", "Sigmoid", "SubVP",
]  # fmt: skip

from diffusion_lab.schedule.base import Schedule
from diffusion_lab.schedule.discrete import (
    Cosine,
    DiscreteSchedule,
    Laplace,
    Linear,
    Quadratic,
    Sigmoid,
)
from diffusion_lab.schedule.edm import EDM
from diffusion_lab.schedule.flow import Flow
from diffusion_lab.schedule.sde import VE, VP, SubVP
