r"""Error measures of a posterior method on a problem with a known posterior.

The samples of n_y observations, n for each, are compared with exact draws. The ranks of the truth
among n_ranks samples are counted over n_coverage observations.

| column | meaning |
|---|---|
| nfe, vjp | calls of the denoiser and backward passes per returned sample |
| sw2 | sliced W_2 between n samples and n exact draws, mean over y |
| sw2_floor | the same between two sets of n exact draws, the value of an exact method |
| mode_tv | total variation between the weights of the posterior's modes |
| variance_ratio | tr Cov of the samples over the exact one, median over y |
| bias | error of the mean over the square root of the exact tr Cov, median over y |
| coverage | fraction of truths (over coordinates) in the central 90% interval; 0.9 is ideal |
| rank_chi2 | χ² of the ranks against uniform ranks, over its degrees of freedom |

sw2 / sw2_floor depends on n and is compared for equal n only. On problems with several modes, each
sample is assigned to a mode and whitened there before sw2 is computed, so that wrong weights count
in mode_tv only. The control is the sampler with the exact denoiser E[x_0 | x_t, y]: its error is
that of the discretization.
"""

__all__ = ["COLUMNS", "diverged", "grade"]

import math
import time
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.analytic import Atoms
from diffusion_lab.guidance import Observation
from diffusion_lab.leaderboard.methods import Counted, Method
from diffusion_lab.leaderboard.problems import Problem
from diffusion_lab.metric import (
    coverage,
    rank_chi2,
    rank_histogram,
    ranks,
    sliced_wasserstein,
    total_variation,
)
from diffusion_lab.rng import KeyedGenerator, make_key

COLUMNS = (
    "problem", "method", "sampler", "steps", "n_y", "n", "nfe", "vjp", "sw2", "sw2_floor",
    "mode_tv", "variance_ratio", "bias", "coverage", "rank_chi2", "seconds",
)  # fmt: skip
LEVEL = 0.9  # the probability of the central intervals


def _sample(
    problem: Problem, method: Method, y: Tensor, n: int, seed: int
) -> tuple[Tensor, dict[str, int]]:
    """n samples for each y, of shape (n_y, n, *), and the counts of calls."""
    denoiser = Counted(problem.prior.denoiser(method.schedule))
    observation = Observation(
        y.repeat_interleave(n, 0), problem.sigma_y, problem.operator, group=n
    )
    generator = torch.Generator().manual_seed(seed)
    x_0 = method.guidance(problem)(denoiser, method.sampler, observation, generator=generator)
    return x_0.reshape(len(y), n, *x_0.shape[1:]), denoiser.counts


def _distance(problem: Problem, posterior: Any, x: Tensor, exact: Tensor, seed: int) -> float:
    """Sliced W_2 of two sets; within the modes if the problem has several."""
    if isinstance(problem.prior, Atoms):
        return math.nan  # only the weights of its points are compared
    if problem.modes:
        x, exact = posterior.whitened(x)[0], posterior.whitened(exact)[0]
    return float(sliced_wasserstein(x.flatten(1), exact.flatten(1), seed=seed))


@dataclass(frozen=True)
class _Reference:
    """An observation y with its posterior and exact draws."""

    y: Tensor
    posterior: Any
    exact: Tensor
    floor: float  # the distance of a second set of exact draws


@cache
def _references(problem: Problem, n_y: int, n: int, seed: int) -> list[_Reference]:
    """One for each y, the same for all methods."""
    generator = torch.Generator().manual_seed(int(make_key(seed, problem.name, "truth")))
    references = []
    for y in problem.observe(n_y, generator)[1]:
        posterior = problem.prior.posterior(y, problem.operator, problem.sigma_y)
        exact, other = (posterior.sample(n, generator) for _ in range(2))
        floor = _distance(problem, posterior, other, exact, seed)
        references.append(_Reference(y, posterior, exact, floor))
    return references


def grade(
    problem: Problem, method: Method, *, n_y: int, n: int, n_coverage: int, n_ranks: int, seed: int
) -> dict[str, Any]:
    """Returns one row of the leaderboard.

    Arguments:
        problem: The problem.
        method: The method.
        n_y: The number of observations that are compared with exact draws.
        n: The number of samples for each of them.
        n_coverage: The number of observations for coverage and ranks; 0 skips both.
        n_ranks: The number of samples for each of those.
        seed: The seed; truths, observations and exact draws are the same for all methods.

    Raises:
        SamplingError: If the method diverges.
    """
    references = _references(problem, n_y, n, seed)
    start = time.perf_counter()
    y = torch.stack([reference.y for reference in references])
    x, counts = _sample(problem, method, y, n, int(make_key(seed, "samples")))
    seconds = time.perf_counter() - start
    found: dict[str, list[float]] = {key: [] for key in ("sw2", "tv", "ratio", "bias")}
    for one, reference in zip(x, references, strict=True):
        posterior = reference.posterior
        found["sw2"].append(_distance(problem, posterior, one, reference.exact, seed))
        weights = posterior.weights
        found["tv"].append(
            float(total_variation(posterior.responsibilities(one).mean(0), weights))
            if len(weights) > 1
            else math.nan
        )
        mean, variance = _moments(posterior)
        flat = one.flatten(1)
        found["ratio"].append(float(flat.var(0).sum() / variance))
        found["bias"].append(float((flat.mean(0) - mean).norm() / variance**0.5))
    row: dict[str, Any] = {
        "problem": problem.name, "method": method.name, "sampler": type(method.sampler).__name__,
        "steps": method.sampler.steps, "n_y": n_y, "n": n,
        "nfe": counts["nfe"] / (n_y * n), "vjp": counts["vjp"] / (n_y * n),
        "sw2": fmean(found["sw2"]), "sw2_floor": fmean(r.floor for r in references),
        "mode_tv": fmean(found["tv"]),
        "variance_ratio": median(found["ratio"]), "bias": median(found["bias"]),
        "coverage": math.nan, "rank_chi2": math.nan, "seconds": seconds,
    }  # fmt: skip
    if n_coverage:
        generator = torch.Generator().manual_seed(int(make_key(seed, problem.name, "coverage")))
        x_0, y = problem.observe(n_coverage, generator)
        x, _ = _sample(problem, method, y, n_ranks, int(make_key(seed, "ranks")))
        place = ranks(x, x_0, KeyedGenerator(make_key(seed, "ties", torch.arange(n_coverage))))
        row["coverage"] = float(coverage(place, n_ranks, LEVEL).mean())
        row["rank_chi2"] = float(rank_chi2(rank_histogram(place, n_ranks)))
    return row


def _moments(posterior: Any) -> tuple[Tensor, float]:
    """The mean (d,) and the trace of the covariance."""
    weights = posterior.weights
    if isinstance(posterior, Atoms):
        means, within = posterior.points.flatten(1), 0.0
    else:
        means = posterior.means
        within = weights @ posterior.eigenvalues.sum(1)
    mean = weights @ means
    return mean, float(within + weights @ (means - mean).square().sum(1))


def diverged(problem: Problem, method: Method, sizes: dict[str, int]) -> dict[str, Any]:
    """Returns the row of a method that has diverged."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
    return row | {
        "problem": problem.name, "method": f"{method.name} (diverged)",
        "sampler": type(method.sampler).__name__, "steps": method.sampler.steps,
        "n_y": sizes["n_y"], "n": sizes["n"],
    }  # fmt: skip
