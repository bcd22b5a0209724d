r"""Grades of a posterior method on a closed-form posterior: one row of the leaderboard.

On each bed, n samples for each of n_y observations are compared with exact draws. Ranks of the
truth among few samples are counted over many observations:

| column | meaning |
|---|---|
| nfe, vjp | calls of the denoiser and backward passes for one sample returned |
| sw2 | sliced W_2 between n samples and n exact draws, mean over y |
| sw2_floor | the same between two sets of n exact draws: the value of an exact method |
| mode_tv | total variation between the weights of the posterior's modes |
| variance_ratio | tr Cov of the samples over the exact one, median over y |
| bias | error of the mean, in standard deviations of the whole posterior, median over y |
| coverage | fraction of truths (over coordinates) in the central 90% interval; 0.9 is ideal |
| rank_chi2 | χ² of the ranks against uniform ranks, over its degrees of freedom |

sw2 / sw2_floor depends on n, so n is fixed. On beds with several modes, sw2 is computed within the
modes: each sample is assigned to its mode and whitened there, so that wrong weights, measured by
mode_tv, do not count twice. The control is the same sampler with the exact denoiser
E[x_0 | x_t, y]: its error is that of the discretization, and the rest of a method's error is due
to the method.
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
from diffusion_lab.leaderboard.problems import Bed
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
    "bed", "method", "sampler", "steps", "n_y", "n", "nfe", "vjp", "sw2", "sw2_floor", "mode_tv",
    "variance_ratio", "bias", "coverage", "rank_chi2", "seconds",
)  # fmt: skip
LEVEL = 0.9  # of the central intervals


def _sample(
    bed: Bed, method: Method, y: Tensor, n: int, seed: int
) -> tuple[Tensor, dict[str, int]]:
    """n samples for each y, of shape (n_y, n, *), and the number of denoised rows."""
    denoiser = Counted(bed.prior.denoiser(method.schedule))
    observation = Observation(y.repeat_interleave(n, 0), bed.sigma_y, bed.operator, group=n)
    generator = torch.Generator().manual_seed(seed)
    x_0 = method.guidance(bed)(denoiser, method.sampler, observation, generator=generator)
    return torch.unflatten(x_0, 0, (len(y), n)), denoiser.counts


def _distance(bed: Bed, posterior: Any, x: Tensor, exact: Tensor, seed: int) -> float:
    """Sliced W_2 of two sets; on beds with modes, of the whitened sets."""
    if isinstance(bed.prior, Atoms):
        return math.nan  # mode_tv is sufficient for atoms
    if bed.modes:
        x, exact = posterior.whitened(x)[0], posterior.whitened(exact)[0]
    return float(sliced_wasserstein(x.flatten(1), exact.flatten(1), seed=seed))


@dataclass(frozen=True)
class _Reference:
    """Exact posterior and draws for one observation y."""

    y: Tensor
    posterior: Any
    exact: Tensor
    floor: float  # distance between two sets of exact draws


@cache
def _references(bed: Bed, n_y: int, n: int, seed: int) -> list[_Reference]:
    """One for each y; the same for all methods."""
    generator = torch.Generator().manual_seed(int(make_key(seed, bed.name, "truth")))
    references = []
    for y in bed.observe(n_y, generator)[1]:
        posterior = bed.prior.posterior(y, bed.operator, bed.sigma_y)
        exact, other = (posterior.sample(n, generator) for _ in range(2))
        floor = _distance(bed, posterior, other, exact, seed)
        references.append(_Reference(y, posterior, exact, floor))
    return references


def grade(
    bed: Bed, method: Method, *, n_y: int, n: int, n_coverage: int, n_ranks: int, seed: int
) -> dict[str, Any]:
    """Returns one row of the leaderboard.

    Arguments:
        bed: The bed.
        method: The method.
        n_y: Number of observations for the comparison with exact draws.
        n: Number of samples per observation.
        n_coverage: Number of observations for the ranks; 0 omits them.
        n_ranks: Number of samples per observation for the ranks.
        seed: Seed of all draws; truths, observations and exact draws are the same for all methods.

    Raises:
        SamplingError: If the method diverges.
    """
    references = _references(bed, n_y, n, seed)
    start = time.perf_counter()
    y = torch.stack([reference.y for reference in references])
    x, counts = _sample(bed, method, y, n, int(make_key(seed, "samples")))
    seconds = time.perf_counter() - start
    found: dict[str, list[float]] = {key: [] for key in ("sw2", "tv", "ratio", "bias")}
    for one, reference in zip(x, references, strict=True):
        posterior = reference.posterior
        found["sw2"].append(_distance(bed, posterior, one, reference.exact, seed))
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
        "bed": bed.name, "method": method.name, "sampler": type(method.sampler).__name__,
        "steps": method.sampler.steps, "n_y": n_y, "n": n,
        "nfe": counts["nfe"] / (n_y * n), "vjp": counts["vjp"] / (n_y * n),
        "sw2": fmean(found["sw2"]), "sw2_floor": fmean(r.floor for r in references),
        "mode_tv": fmean(found["tv"]),
        "variance_ratio": median(found["ratio"]), "bias": median(found["bias"]),
        "coverage": math.nan, "rank_chi2": math.nan, "seconds": seconds,
    }  # fmt: skip
    if n_coverage:
        generator = torch.Generator().manual_seed(int(make_key(seed, bed.name, "coverage")))
        x_0, y = bed.observe(n_coverage, generator)
        x, _ = _sample(bed, method, y, n_ranks, int(make_key(seed, "ranks")))
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


def diverged(bed: Bed, method: Method, sizes: dict[str, int]) -> dict[str, Any]:
    """Returns the row of a method that has diverged."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
    return row | {
        "bed": bed.name, "method": f"{method.name} (diverged)",
        "sampler": type(method.sampler).__name__, "steps": method.sampler.steps,
        "n_y": sizes["n_y"], "n": sizes["n"],
    }  # fmt: skip
