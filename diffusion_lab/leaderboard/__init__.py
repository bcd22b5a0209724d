"""Benchmark of all posterior methods on problems with closed-form posteriors."""

__all__ = ["BEDS", "Bed", "ExactPosterior", "Method", "grade"]

from diffusion_lab.leaderboard.exact_posterior import ExactPosterior
from diffusion_lab.leaderboard.grade import grade
from diffusion_lab.leaderboard.methods import Method
from diffusion_lab.leaderboard.problems import BEDS, Bed
