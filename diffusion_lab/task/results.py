"""Rows of results.csv, the table of an evaluation."""

__all__ = ["Row", "average", "write_results"]

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from diffusion_lab.atomic_io import write_csv


class Row(NamedTuple):
    """One row of results.csv.

    Attributes:
        estimate: Name of the estimate.
        metric: Name of the metric.
        mean: Mean over n values.
        stderr: Standard error of the mean; NaN if it is unknown.
        n: Number of values.
    """

    estimate: str
    metric: str
    mean: float
    stderr: float
    n: int


def average(estimate: str, metric: str, values: Sequence[float]) -> Row:
    """Returns the row of the mean of values, one per image.

    The error of one value, or of values that are not all finite, is NaN. The PSNR of a noiseless
    observation is infinite.
    """
    n = len(values)
    mean = sum(values) / n if n else float("nan")
    if n < 2 or not all(map(isfinite, values)):
        return Row(estimate, metric, mean, float("nan"), n)
    return Row(estimate, metric, fmean(values), stdev(values) / n**0.5, n)


def write_results(directory: Path, rows: Sequence[Row]) -> None:
    """Writes the rows to results.csv in a directory."""
    write_csv(directory / "results.csv", Row._fields, rows)
