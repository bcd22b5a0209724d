"""Leaderboard of posterior methods on problems whose posterior is known in closed form."""

__all__ = ["PROBLEMS", "ExactPosterior", "Method", "Problem", "grade"]

from diffusion_lab.leaderboard.exact_posterior import ExactPosterior
from diffusion_lab.leaderboard.grade import grade
from diffusion_lab.leaderboard.methods import Method
from diffusion_lab.leaderboard.problems import PROBLEMS, Problem
