r"""The leaderboard: every posterior method against posteriors that are known exactly.

On each bed, n_y observations with n samples of each are compared with exact draws, and the ranks
of the truth among few samples are counted over many observations:

| column | meaning |
|---|---|
| nfe, vjp | calls of the denoiser and backward passes for one sample returned |
| sw2 | sliced W_2 between n samples and n exact draws, mean over y |
| sw2_floor | the same between two sets of n exact draws: what an exact method would get |
| mode_tv | total variation between the weights of the posterior's modes |
| variance_ratio | tr Cov of the samples over the exact one, median over y |
| bias | error of the mean, in standard deviations of the posterior as a whole, median over y |
| coverage | share of truths (over coordinates) in the central 90% interval; 0.9 is ideal |
| rank_chi2 | χ² of the ranks from uniform, over its degrees of freedom |

sw2 / sw2_floor depends on n, so n is fixed. On beds with several modes sw2 is taken within the
modes: each sample is assigned to its mode and whitened there, so that wrong weights, which
mode_tv tells, do not count twice. The control is the same sampler with the exact denoiser
E[x_0 | x_t, y]: what is left to it is the discretisation, and the rest of a method's error is the
method's own.

Beds and methods are shared out among processes of one thread each, which is also what makes the
figures those of any machine's number of cores.
"""

__all__ = ["COLUMNS", "ExactPosterior", "grade", "markdown"]

import csv
import io
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_lab.analytic import Atoms
from diffusion_lab.benchmark.beds import BEDS, Bed
from diffusion_lab.benchmark.methods import CONTROL, Counted, Method, methods_table
from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.files import write_atomic
from diffusion_lab.guidance import Observation
from diffusion_lab.metric import (
    coverage,
    rank_chi2,
    rank_histogram,
    ranks,
    sliced_wasserstein,
    total_variation,
)
from diffusion_lab.noise import KeyedGenerator, make_key
from diffusion_lab.tracking.report import Curve, Table, write_report

log = logging.getLogger(__name__)

COLUMNS = (
    "bed", "method", "sampler", "steps", "n_y", "n", "nfe", "vjp", "sw2", "sw2_floor", "mode_tv",
    "variance_ratio", "bias", "coverage", "rank_chi2", "seconds",
)  # fmt: skip
HEADER = (
    "method", "sampler, steps", "nfe + 2 vjp", "sw2 / floor", "mode_tv", "variance", "bias",
    "coverage", "rank χ²", "s",
)  # fmt: skip
SUMMARY = (
    "Samples of each method beside exact draws of posteriors in closed form. sw2 is the sliced "
    "Wasserstein distance and sw2_floor that of two sets of exact draws; mode_tv the total "
    "variation of the modes' weights; variance_ratio and bias (in posterior standard deviations) "
    "are medians over the observations; coverage is that of the central 90% interval.\n\n"
    "The control is the same sampler with the exact E[x_0 | x_t, y]: what it lacks is the "
    "discretisation's, the rest is the method's."
)
LEVEL = 0.9  # of the central intervals


def _sample(
    bed: Bed, method: Method, y: Tensor, n: int, seed: int
) -> tuple[Tensor, dict[str, int]]:
    """n samples for each y, of shape (n_y, n, *), and the rows that they took."""
    denoiser = Counted(bed.prior.denoiser(method.schedule))
    observation = Observation(y.repeat_interleave(n, 0), bed.sigma_y, bed.operator, group=n)
    generator = torch.Generator().manual_seed(seed)
    x_0 = method.guidance(bed)(denoiser, method.sampler, observation, generator=generator)
    return x_0.unflatten(0, (len(y), n)), denoiser.counts


def _distance(bed: Bed, posterior: Any, x: Tensor, exact: Tensor, seed: int) -> float:
    """Sliced W_2 of two sets, on beds with modes that of the whitened ones."""
    if isinstance(bed.prior, Atoms):
        return math.nan  # the weights say it all
    if bed.modes:
        x, exact = posterior.whitened(x)[0], posterior.whitened(exact)[0]
    return float(sliced_wasserstein(x.flatten(1), exact.flatten(1), seed=seed))


@dataclass(frozen=True)
class _Reference:
    """What the samples of one observation y are compared with."""

    y: Tensor
    posterior: Any
    exact: Tensor
    floor: float  # the distance of other exact draws to these


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
        n_y: Observations for the comparison with exact draws.
        n: Samples of each.
        n_coverage: Observations for the ranks; 0 leaves them out.
        n_ranks: Samples of each for the ranks.
        seed: Of all draws; truths, observations and exact draws are the same for all methods.

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


class ExactPosterior:
    """Grades methods on beds and writes leaderboard.csv, leaderboard.md and report.html.

    Rows are written as they come; beds and methods are in the order of the tables.

    Arguments:
        directory: Where the files go.
        seed: Of all draws.
        beds: The beds, None for all.
        methods: The methods by name, None for all; the control is always there.
        n_y: Observations for the comparison with exact draws, at least 1.
        n: Samples of each, at least 2.
        n_coverage: Observations for coverage and ranks, at least 1.
        n_ranks: Samples of each for those, at least 2; 19 makes the 90% interval exact.
        processes: How many rows are worked on at once, at least 1; None for one a core.

    Raises:
        ConfigError: If a bed or a method is unknown; names those that there are.
    """

    def __init__(
        self,
        directory: Path,
        seed: int = 0,
        beds: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        n_y: int = 8,
        n: int = 1024,
        n_coverage: int = 512,
        n_ranks: int = 19,
        processes: int | None = None,
    ) -> None:
        self.directory, self.seed = directory, seed
        self.sizes = {"n_y": n_y, "n": n, "n_coverage": n_coverage, "n_ranks": n_ranks}
        self.processes = processes or len(os.sched_getaffinity(0))
        self.beds = [_known("beds", name, BEDS) for name in beds or BEDS]
        every = _methods()
        wanted = [_known("methods", name, every) for name in methods or every]
        self.methods = [*(m for m in every if m == CONTROL and m not in wanted), *wanted]

    def __call__(self) -> list[dict[str, Any]]:
        """Grades all and returns the rows."""
        rows: list[dict[str, Any]] = []
        graded = partial(_row, seed=self.seed, sizes=self.sizes)
        pairs = [(b, m) for b in self.beds for m in self.methods]
        work = [(b, m) for b, m in pairs if _defined(_methods()[m], _bed(b))]
        with _workers(min(self.processes, len(work))) as each:
            found = each(graded, *zip(*work, strict=True))
            for row in tqdm(found, "leaderboard", len(work), dynamic_ncols=True, disable=None):
                rows.append(row)
                self._write_csv(rows)
        text = markdown(rows)
        write_atomic(self.directory / "leaderboard.md", text.encode())
        self._report(rows)
        print(f"\n{text}\nleaderboard: {self.directory / 'leaderboard.csv'}")
        print(f"report: {self.directory / 'report.html'}")
        return rows

    def _write_csv(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.directory / "leaderboard.csv", text.getvalue().encode())

    def _report(self, rows: list[dict[str, Any]]) -> None:
        sections: list[Any] = []
        for bed, group in _by_bed(rows):
            # A dot a method: how far from exact, at what price.
            dots = {
                row["method"]: ([_cost(row)], [row["sw2"] / row["sw2_floor"]])
                for row in group
                if row["sw2"] == row["sw2"]
            }
            if dots:
                sections.append(
                    Curve(
                        f"{bed}: distance and cost",
                        "Sliced W_2 over that of exact draws (1 is exact), against network calls "
                        "plus twice the backward passes, for one sample.",
                        "nfe + 2 vjp", "sw2 / floor", dots, log_x=True, log_y=True,
                    )
                )  # fmt: skip
            sections.append(
                Table(bed, "", HEADER, [_cells(row) for row in group])
            )  # fmt: skip
        write_report(
            self.directory / "report.html",
            "Posterior methods against exact posteriors",
            SUMMARY,
            sections,
        )


@cache
def _bed(name: str) -> Bed:
    return BEDS[name]()


@cache
def _methods() -> dict[str, Method]:
    return {method.name: method for method in methods_table()}


def _row(bed: str, method: str, *, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """One row, in whatever process; named, for methods are made of functions without a name."""
    try:
        return grade(_bed(bed), _methods()[method], seed=seed, **sizes)
    except SamplingError as error:
        log.warning("%s on %s diverged: %s", method, bed, error)
        return _diverged(_bed(bed), _methods()[method], sizes)


@contextmanager
def _workers(count: int) -> Iterator[Any]:
    """Yields map(), over processes of one thread each if there are several."""
    if count == 1:
        yield map
        return
    # Started afresh: threads of torch do not outlive a fork.
    with ProcessPoolExecutor(
        count, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the leaderboard as Markdown, a table for each bed."""
    parts = []
    for bed, group in _by_bed(rows):
        lines = [f"### {bed}", "", _line(HEADER), "|" + "---|" * len(HEADER)]
        lines += [_line(_cells(row)) for row in group]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the tables, as in HEADER."""
    figures = [
        _cost(row), row["sw2"] / row["sw2_floor"], row["mode_tv"], row["variance_ratio"],
        row["bias"], row["coverage"], row["rank_chi2"], row["seconds"],
    ]  # fmt: skip
    return [row["method"], f"{row['sampler']}, {row['steps']}", *map(_figure, figures)]


def _by_bed(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(bed, list(group)) for bed, group in groupby(rows, key=lambda row: row["bed"])]


def _cost(row: dict[str, Any]) -> float:
    return row["nfe"] + 2 * row["vjp"]


def _figure(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return "–" if value != value else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _known(key: str, name: str, options: dict[str, Any]) -> str:
    if name not in options:
        raise ConfigError(f"benchmark.{key}: {name} is unknown; choose from " + ", ".join(options))
    return name


def _defined(method: Method, bed: Bed) -> bool:
    """Whether a method is graded on a bed: it says so, and is defined there."""
    if method.beds is not None and bed.name not in method.beds:
        return False
    try:
        method.guidance(bed).check(Observation(bed.nothing, bed.sigma_y, bed.operator))
    except ValueError:
        return False
    return True


def _diverged(bed: Bed, method: Method, sizes: dict[str, int]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
    return row | {
        "bed": bed.name, "method": f"{method.name} (diverged)",
        "sampler": type(method.sampler).__name__, "steps": method.sampler.steps,
        "n_y": sizes["n_y"], "n": sizes["n"],
    }  # fmt: skip
