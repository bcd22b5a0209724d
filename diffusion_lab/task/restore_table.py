"""Rows of results.csv of a restoration."""

__all__ = [
    "COVERAGE_LEVEL", "ESTIMATES", "RANK_KINDS", "exact_values", "print_rows", "rank_counts",
    "result_rows",
]  # fmt: skip

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.metric import (
    METRICS,
    EfficientNetLite0,
    Moments,
    extract,
    frechet_distance,
    nominal_coverage,
    rank_chi2,
    spread_skill_ratio,
)
from diffusion_lab.task.results import Row, average

COVERAGE_LEVEL = 0.9  # of the central intervals whose coverage is in the table
MIN_FRECHET = 16  # smallest number of images for the Fréchet distance
ESTIMATES = {
    "noisy": "the observation y itself, unclipped",
    "sample": "one posterior sample (averaged over the samples of an image)",
    "mean": "the mean of the posterior samples",
    "mmse": "E[x_0 | y] by one call of the network",
    "posterior": "all samples of an image together, as a distribution",
}  # in the order of the table, with a description
RANK_KINDS = {
    "pixels": "single pixels",
    "patches": "means of patches",
    "random": "random projections",
}
NAN = float("nan")


def result_rows(results: Sequence[dict[str, Any]], num_samples: int) -> list[Row]:
    """Returns the rows of results.csv.

    The first row is the number of images on which the method diverged; the other rows are of the
    remaining images.

    Arguments:
        results: The results of all images, in order.
        num_samples: Number M of samples of each image.
    """
    graded = [result for result in results if result["finite"] and "scores" in result]
    failed = sum(not result["finite"] for result in results)
    rows = [Row("sample", "nonfinite", float(failed), NAN, len(results))]
    if not graded:
        return rows
    order, metrics = list(ESTIMATES), [metric.name for metric in METRICS]
    keys = sorted(
        graded[0]["scores"], key=lambda key: (metrics.index(key[1]), order.index(key[0]))
    )
    for estimate, metric in keys:
        values = [result["scores"][estimate, metric] for result in graded]
        rows.append(average(estimate, metric, values))
    if "ranks" in graded[0]:
        rows.append(average("posterior", "coverage_90", [r["coverage"] for r in graded]))
        spread, error = (torch.tensor([r[k] for r in graded]) for k in ("spread", "error"))
        ratio = float(spread_skill_ratio(spread, error, num_samples))
        rows.append(Row("posterior", "spread_skill", ratio, NAN, len(graded)))
        for kind in RANK_KINDS:
            chi2 = float(rank_chi2(rank_counts(graded, kind)))
            rows.append(Row("posterior", f"rank_chi2_{kind}", chi2, NAN, len(graded)))
    if len(graded) >= MIN_FRECHET and (distance := _frechet(graded)) is not None:
        rows.append(Row("sample", f"frechet_{len(graded)}", distance, NAN, len(graded)))
    return rows


def rank_counts(results: Sequence[dict[str, Any]], kind: str) -> Tensor:
    """Returns how often the truth has each rank 0..M over all images, int64, of shape (M + 1,)."""
    total: Counter[int] = Counter()
    for result in results:
        total.update(dict(enumerate(result["ranks"][kind])))
    return torch.tensor([total[k] for k in sorted(total)])


def exact_values(num_samples: int) -> str:
    """Returns the values of an exact posterior sampler in the table, as a sentence."""
    if num_samples < 2:
        return ""
    return (
        "coverage_90 is the share of pixels in the central interval, ideally "
        f"{nominal_coverage(num_samples, COVERAGE_LEVEL):.3f} for {num_samples} samples; "
        "spread_skill is ideally 1."
    )


def print_rows(rows: Sequence[Row]) -> None:
    """Prints the rows as a table."""
    print(f"{'estimate':10}{'metric':14}{'mean':>9}{'stderr':>9}{'n':>6}")
    for estimate, metric, mean, error, n in rows:
        print(f"{estimate:10}{metric:14}{mean:9.3f}{error:9.3f}{n:6d}")


def _frechet(results: Sequence[dict[str, Any]]) -> float | None:
    """The Fréchet distance of the first samples and the clean images; None without an extractor.

    In the features of EfficientNet-Lite0, which compare sets of the same images only.
    """
    try:
        network = EfficientNetLite0()
    except ConfigError:
        return None
    sets = (
        torch.stack([result[key] for result in results]).permute(0, 2, 3, 1)
        for key in ("sample", "clean")
    )
    return frechet_distance(*(Moments.of(extract(network, images)) for images in sets))
