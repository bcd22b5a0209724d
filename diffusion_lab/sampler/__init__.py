"""Samplers: numerical solvers of the reverse process, from noise to samples."""

__all__ = [
    "DDIM", "SEEDS", "Ancestral", "AnnealedLangevin", "DPMSolver", "EulerMaruyama", "Heun",
    "PredictorCorrector", "ProbabilityFlow", "ReverseDiffusion", "Sampler", "State", "UniPC",
]  # fmt: skip

from diffusion_lab.sampler.ancestral import Ancestral
from diffusion_lab.sampler.base import Sampler, State
from diffusion_lab.sampler.ddim import DDIM
from diffusion_lab.sampler.dpm_solver import SEEDS, DPMSolver, UniPC
from diffusion_lab.sampler.heun import Heun
from diffusion_lab.sampler.langevin import AnnealedLangevin, PredictorCorrector
from diffusion_lab.sampler.ode import ProbabilityFlow
from diffusion_lab.sampler.sde import EulerMaruyama, ReverseDiffusion
