"""Closed-form test beds, and every posterior method graded on them."""

__all__ = ["BEDS", "Bed", "ExactPosterior", "Method", "grade"]

from diffusion_lab.benchmark.beds import BEDS, Bed
from diffusion_lab.benchmark.exact_posterior import ExactPosterior
from diffusion_lab.benchmark.grade import grade
from diffusion_lab.benchmark.methods import Method
