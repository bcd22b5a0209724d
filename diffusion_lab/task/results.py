"""Rows of results.csv."""

__all__ = ["Row", "average", "write_results"]

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from diffusion_lab.atomic_io import write_atomic

Row = tuple[str, str, float, float, int]  # estimate, metric, mean, standard error, n


def average(estimate: str, metric: str, values: Sequence[float]) -> Row:
    """Returns the mean over the images, and its standard error (NaN of a single one)."""
    n = len(values)
    error = stdev(values) / n**0.5 if n > 1 else float("nan")
    return estimate, metric, fmean(values) if n else float("nan"), error, n


def write_results(directory: Path, rows: Sequence[Row]) -> None:
    """Writes results.csv."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["estimate", "metric", "mean", "stderr", "n"])
    writer.writerows(rows)
    write_atomic(directory / "results.csv", text.getvalue().encode())
