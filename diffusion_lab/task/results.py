"""Rows of results.csv, the table of an evaluation."""

__all__ = ["Row", "average", "write_results"]

from collections.abc import Sequence
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
    """Returns the row of the mean of values, one per image; the error of one value is NaN."""
    n = len(values)
    stderr = stdev(values) / n**0.5 if n > 1 else float("nan")
    return Row(estimate, metric, fmean(values) if n else float("nan"), stderr, n)


def write_results(directory: Path, rows: Sequence[Row]) -> None:
    """Writes the rows to results.csv in a directory."""
    write_csv(directory / "results.csv", Row._fields, rows)
