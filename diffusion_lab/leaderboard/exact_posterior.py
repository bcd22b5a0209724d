"""Leaderboard of posterior methods on problems whose posterior is known exactly.

`grade` describes the columns. Rows are distributed over processes of one thread each, so that the
results do not depend on the number of cores.
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
from diffusion_lab.constraints import AtLeastTwo, NonNegativeInt, PositiveInt, checked
from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.guidance import Observation
from diffusion_lab.leaderboard.grade import COLUMNS, diverged, grade
from diffusion_lab.leaderboard.methods import CONTROL, Method, method_rows
from diffusion_lab.leaderboard.problems import PROBLEMS, Problem
from diffusion_lab.report.page import LineChart, Table, write_report

log = logging.getLogger(__name__)

HEADER = (
    "method", "sampler, steps", "nfe + 2 vjp", "sw2 / floor", "mode_tv", "variance", "bias",
    "coverage", "rank χ²", "s",
)  # fmt: skip
SUMMARY = (
    "Samples of each method compared with exact draws from posteriors in closed form. sw2 is the "
    "sliced Wasserstein distance and sw2_floor that of two sets of exact draws; mode_tv is the "
    "total variation of the weights of the modes; variance_ratio and bias (in posterior standard "
    "deviations) are medians over the observations; coverage is that of the central 90% "
    "interval.\n\n"
    "The control is the same sampler with the exact E[x_0 | x_t, y]: its error is that of the "
    "discretization."
)


class ExactPosterior:
    """Grades methods on problems and writes leaderboard.csv, leaderboard.md and report.html.

    Rows are written as they are computed, in the order of the tables.

    Arguments:
        directory: The directory of the files.
        seed: The seed of all draws.
        problems: Names of problems; None for all.
        methods: Names of rows; None for all. The control is always included.
        n_y: The number of observations that are compared with exact draws.
        n: The number of samples for each of them.
        n_coverage: The number of observations for coverage and ranks.
        n_ranks: The number of samples for each of those; 19 makes the 90% interval exact.
        processes: The number of rows computed in parallel; None for one per core.

    Raises:
        ConfigError: If a problem or a method is unknown; lists the known ones.
    """

    @checked
    def __init__(
        self,
        directory: Path,
        seed: NonNegativeInt = 0,
        problems: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        n_y: PositiveInt = 8,
        n: AtLeastTwo = 1024,
        n_coverage: PositiveInt = 512,
        n_ranks: AtLeastTwo = 19,
        processes: PositiveInt | None = None,
    ) -> None:
        self.directory, self.seed = directory, seed
        self.sizes = {"n_y": n_y, "n": n, "n_coverage": n_coverage, "n_ranks": n_ranks}
        self.processes = processes or len(os.sched_getaffinity(0))
        self.problems = [_known("problems", name, PROBLEMS) for name in problems or PROBLEMS]
        every = method_rows()
        wanted = [_known("methods", name, every) for name in methods or every]
        self.methods = [*(m for m in every if m == CONTROL and m not in wanted), *wanted]

    def __call__(self) -> list[dict[str, Any]]:
        """Grades all methods on all problems and returns the rows."""
        rows: list[dict[str, Any]] = []
        graded = partial(_row, seed=self.seed, sizes=self.sizes)
        pairs = [(p, m) for p in self.problems for m in self.methods]
        work = [(p, m) for p, m in pairs if _defined(_method(m), _problem(p))]
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
        for problem, group in _by_problem(rows):
            # One dot for each method.
            dots = {
                row["method"]: ([_cost(row)], [row["sw2"] / row["sw2_floor"]])
                for row in group
                if row["sw2"] == row["sw2"]
            }
            if dots:
                sections.append(
                    LineChart(
                        f"{problem}: distance and cost",
                        "Sliced W_2 over that of exact draws (1 is exact), against network calls "
                        "plus twice the backward passes, for one sample.",
                        "nfe + 2 vjp", "sw2 / floor", dots, log_x=True, log_y=True,
                    )
                )  # fmt: skip
            sections.append(
                Table(problem, "", HEADER, [_cells(row) for row in group])
            )  # fmt: skip
        write_report(
            self.directory / "report.html",
            "Posterior methods against exact posteriors",
            SUMMARY,
            sections,
        )


@cache
def _problem(name: str) -> Problem:
    return PROBLEMS[name]()


@cache
def _method(name: str) -> Method:
    return method_rows()[name].build()


def _row(problem: str, method: str, *, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Computes one row. Takes names, because problems and methods cannot be pickled."""
    try:
        return grade(_problem(problem), _method(method), seed=seed, **sizes)
    except SamplingError as error:
        log.warning("%s on %s diverged: %s", method, problem, error)
        return diverged(_problem(problem), _method(method), sizes)


@contextmanager
def _workers(count: int) -> Iterator[Any]:
    """Yields `map`, or that of a pool of processes of one thread each if count > 1."""
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
    """Returns the leaderboard as Markdown, one table per problem."""
    parts = []
    for problem, group in _by_problem(rows):
        lines = [f"### {problem}", "", _line(HEADER), "|" + "---|" * len(HEADER)]
        lines += [_line(_cells(row)) for row in group]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: dict[str, Any]) -> list[str]:
    """The cells of one row, in the order of HEADER."""
    figures = [
        _cost(row), row["sw2"] / row["sw2_floor"], row["mode_tv"], row["variance_ratio"],
        row["bias"], row["coverage"], row["rank_chi2"], row["seconds"],
    ]  # fmt: skip
    return [row["method"], f"{row['sampler']}, {row['steps']}", *map(_figure, figures)]


def _by_problem(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (problem, list(group)) for problem, group in groupby(rows, key=lambda row: row["problem"])
    ]


def _cost(row: dict[str, Any]) -> float:
    return float(row["nfe"] + 2 * row["vjp"])


def _figure(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return "–" if value != value else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _known(key: str, name: str, options: dict[str, Any]) -> str:
    if name not in options:
        raise ConfigError(f"benchmark.{key}: {name} is unknown; choose from " + ", ".join(options))
    return name


def _defined(method: Method, problem: Problem) -> bool:
    """Whether a method is graded on a problem and is defined for its observations."""
    if method.problems is not None and problem.name not in method.problems:
        return False
    try:
        method.guidance(problem).check(
            Observation(problem.zero, problem.sigma_y, problem.operator)
        )
    except ValueError:
        return False
    return True
