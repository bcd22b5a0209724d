"""Leaderboard: all posterior methods on problems with closed-form posteriors.

See `grade` for the columns. Beds and methods are distributed over processes of one thread each, so
that the results do not depend on the number of cores.
"""

__all__ = ["ExactPosterior", "markdown"]

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion_lab.atomic_io import write_atomic, write_csv
from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.guidance import Observation
from diffusion_lab.leaderboard.grade import COLUMNS, diverged, grade
from diffusion_lab.leaderboard.methods import CONTROL, Method, methods_table
from diffusion_lab.leaderboard.problems import BEDS, Bed
from diffusion_lab.report.page import LineChart, Table, write_report

log = logging.getLogger(__name__)

HEADER = (
    "method", "sampler, steps", "nfe + 2 vjp", "sw2 / floor", "mode_tv", "variance", "bias",
    "coverage", "rank χ²", "s",
)  # fmt: skip
SUMMARY = (
    "Samples of each method beside exact draws of posteriors in closed form. sw2 is the sliced "
    "Wasserstein distance and sw2_floor that of two sets of exact draws; mode_tv the total "
    "variation of the modes' weights; variance_ratio and bias (in posterior standard deviations) "
    "are medians over the observations; coverage is that of the central 90% interval.\n\n"
    "The control is the same sampler with the exact E[x_0 | x_t, y]: its error is that of the "
    "discretization, the rest is the error of the method."
)


class ExactPosterior:
    """Grades methods on beds and writes leaderboard.csv, leaderboard.md and report.html.

    Each row is written when it is complete; beds and methods are in the order of the tables.

    Arguments:
        directory: Directory of the files.
        seed: Seed of all draws.
        beds: Names of the beds, None for all.
        methods: Names of the methods, None for all; the control is always included.
        n_y: Number of observations for the comparison with exact draws, at least 1.
        n: Number of samples per observation, at least 2.
        n_coverage: Number of observations for coverage and ranks, at least 1.
        n_ranks: Number of samples per observation for these, at least 2; 19 makes the 90%
            interval exact.
        processes: Number of rows computed at once, at least 1; None for one per core.

    Raises:
        ConfigError: If a bed or a method is unknown; lists the known ones.
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
                values = [[row[name] for name in COLUMNS] for row in rows]
                write_csv(self.directory / "leaderboard.csv", COLUMNS, values)
        text = markdown(rows)
        write_atomic(self.directory / "leaderboard.md", text.encode())
        self._report(rows)
        print(f"\n{text}\nleaderboard: {self.directory / 'leaderboard.csv'}")
        print(f"report: {self.directory / 'report.html'}")
        return rows

    def _report(self, rows: list[dict[str, Any]]) -> None:
        sections: list[Any] = []
        for bed, group in _by_bed(rows):
            # One dot per method: distance to the exact posterior over cost.
            dots = {
                row["method"]: ([_cost(row)], [row["sw2"] / row["sw2_floor"]])
                for row in group
                if row["sw2"] == row["sw2"]
            }
            if dots:
                sections.append(
                    LineChart(
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
    """One row, in any process. Takes names, because methods cannot be pickled."""
    try:
        return grade(_bed(bed), _methods()[method], seed=seed, **sizes)
    except SamplingError as error:
        log.warning("%s on %s diverged: %s", method, bed, error)
        return diverged(_bed(bed), _methods()[method], sizes)


@contextmanager
def _workers(count: int) -> Iterator[Any]:
    """Yields map(), over processes of one thread each if there are several."""
    if count == 1:
        yield map
        return
    # Spawned, because the threads of torch do not survive a fork.
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
    """A row of the tables, in the order of HEADER."""
    figures = [
        _cost(row), row["sw2"] / row["sw2_floor"], row["mode_tv"], row["variance_ratio"],
        row["bias"], row["coverage"], row["rank_chi2"], row["seconds"],
    ]  # fmt: skip
    return [row["method"], f"{row['sampler']}, {row['steps']}", *map(_figure, figures)]


def _by_bed(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(bed, list(group)) for bed, group in groupby(rows, key=lambda row: row["bed"])]


def _cost(row: dict[str, Any]) -> float:
    cost: float = row["nfe"] + 2 * row["vjp"]
    return cost


def _figure(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return "–" if value != value else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _known(key: str, name: str, options: dict[str, Any]) -> str:
    if name not in options:
        raise ConfigError(f"benchmark.{key}: {name} is unknown; choose from " + ", ".join(options))
    return name


def _defined(method: Method, bed: Bed) -> bool:
    """Whether a method is graded on a bed: the bed is listed, and the method is defined there."""
    if method.beds is not None and bed.name not in method.beds:
        return False
    try:
        method.guidance(bed).check(Observation(bed.nothing, bed.sigma_y, bed.operator))
    except ValueError:
        return False
    return True
