"""The leaderboard: every posterior method against posteriors that are known exactly.

What the columns mean: see `grade`. Beds and methods are shared out among processes of one thread
each, which is also what makes the figures those of any machine's number of cores.
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
    "The control is the same sampler with the exact E[x_0 | x_t, y]: what it lacks is the "
    "discretisation's, the rest is the method's."
)


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
            # A dot a method: how far from exact, at what price.
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
    """One row, in whatever process; named, for methods are made of functions without a name."""
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
    """Whether a method is graded on a bed: it says so, and is defined there."""
    if method.beds is not None and bed.name not in method.beds:
        return False
    try:
        method.guidance(bed).check(Observation(bed.nothing, bed.sigma_y, bed.operator))
    except ValueError:
        return False
    return True
