"""Sweep report: `summary.csv` with one row per job, and `report.html`.

They are written from the jobs' directories: the overrides from `.hydra/overrides.yaml`, the status
from `finished.json` and `failed.json`, and the metrics from `metrics.csv` (training: the last
values) or `results.csv` (evaluation: the means, named estimate/metric).
"""

__all__ = ["Job", "read_jobs", "summarize"]

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffusion_lab import runs
from diffusion_lab.atomic_io import write_csv
from diffusion_lab.metric import METRICS
from diffusion_lab.redact import mask
from diffusion_lab.report.page import (
    Cell,
    KeyValueSection,
    LineChart,
    Section,
    Table,
    write_report,
)

log = logging.getLogger(__name__)

LOSS = "val/loss_ema"
CHARTS = (
    *(metric.name for metric in METRICS if metric.estimates), "fid", "kid", "frechet",
    "bits_per_dim",
)  # fmt: skip  # prefixes of the names of metrics
HIGHER_IS_BETTER = {metric.name: metric.higher_is_better for metric in METRICS}
ESTIMATES = ("mean", "sample")  # in order of preference if a chart has room for one
NAMED = 20  # number of jobs up to which a caption lists the overrides of each
WIDE = 30  # ratio of the largest to the smallest value from which an axis is logarithmic
UNKNOWN = "no end was recorded: interrupted, killed, or still running"


@dataclass(frozen=True)
class Job:
    """Job of a sweep.

    Attributes:
        directory: Directory, named by the number of the job.
        overrides: Overrides by key.
        status: finished, failed or unfinished.
        error: Reason for another status than finished.
        step: Number of optimizer steps of a training.
        figures: Last metrics of a training, or mean results of an evaluation.
        losses: Steps and validation losses of a training.
    """

    directory: Path
    overrides: dict[str, str]
    status: str
    error: str
    step: int | None
    figures: dict[str, float]
    losses: tuple[list[float], list[float]]


def read_jobs(directory: Path) -> list[Job]:
    """Returns the jobs of a sweep that have started, in order.

    Arguments:
        directory: Directory of the sweep.
    """
    found = [path.parents[1] for path in directory.glob("*/.hydra/overrides.yaml")]
    return [_read(path) for path in sorted(found, key=lambda path: (len(path.name), path.name))]


def _read(directory: Path) -> Job:
    texts = yaml.safe_load(mask((directory / ".hydra" / "overrides.yaml").read_text())) or []
    overrides = {key.lstrip("+~"): value for key, _, value in (t.partition("=") for t in texts)}
    figures: dict[str, float] = {}
    losses: tuple[list[float], list[float]] = ([], [])
    step: int | None = None
    if (path := directory / "results.csv").exists():
        figures = {f"{row['estimate']}/{row['metric']}": float(row["mean"]) for row in _rows(path)}
    elif (path := directory / "metrics.csv").exists():
        for row in _rows(path):
            step = int(row["step"]) + 1  # logged under the number of steps before
            for name, value in row.items():
                if value and name.startswith(("train/loss", "val/")) and "_bin/" not in name:
                    figures[name] = float(value)
            if row.get(LOSS):
                losses[0].append(step)
                losses[1].append(float(row[LOSS]))
    status, error = "unfinished", UNKNOWN
    if (path := directory / runs.FAILED_FILE).exists():
        status, error = "failed", json.loads(path.read_text())["error"]
    elif (directory / runs.FINISHED_FILE).exists() or _evaluated(directory):
        status, error = "finished", ""
    return Job(directory, overrides, status, error, step, figures, losses)


def _evaluated(directory: Path) -> bool:
    """Whether the directory holds a finished evaluation."""
    note, partial, page = (
        directory / n for n in (runs.EVALUATION_FILE, runs.PARTIAL_DIR, "report.html")
    )
    return note.exists() and page.exists() and not partial.exists()


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def summarize(directory: Path) -> int:
    """Writes `summary.csv` and `report.html` into a sweep's directory, and logs their paths.

    Arguments:
        directory: Directory of the sweep.

    Returns:
        The number of jobs that failed.
    """
    jobs = read_jobs(directory)
    if not jobs:
        return 0
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    figures = list(dict.fromkeys(name for job in jobs for name in job.figures))
    rows = [
        [
            job.directory.name,
            *(job.overrides.get(key) for key in keys),
            job.status,
            job.step,
            *(job.figures.get(name) for name in figures),
            job.error,
        ]
        for job in jobs
    ]
    columns = ["job", *keys, "status", "step", *figures, "error"]
    path = write_csv(directory / "summary.csv", columns, rows)
    counts = {kind: sum(job.status == kind for job in jobs) for kind in ("finished", "failed")}
    counts["unfinished"] = len(jobs) - sum(counts.values())
    ends = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    title = f"Sweep {directory.resolve().name}"
    report = write_report(
        directory / "report.html", title, f"{len(jobs)} jobs: {ends}.", _sections(jobs, figures)
    )
    log.info("sweep: %d jobs, %s: %s and %s", len(jobs), ends, path, report)
    for job in jobs:
        if job.status != "finished":
            name = f"job {job.directory.name} ({_name(job, _swept(jobs))})"
            log.error("%s: %s: %s", job.status, name, job.error.partition("\n")[0])
    return counts["failed"]


def _swept(jobs: Sequence[Job]) -> list[str]:
    """Keys in which the jobs differ."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def _name(job: Job, keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={job.overrides[key]}" for key in keys if key in job.overrides)


def _sections(jobs: Sequence[Job], figures: Sequence[str]) -> list[Section]:
    keys = _swept(jobs)
    trained = any(job.step is not None for job in jobs)
    has_errors = any(job.error for job in jobs)
    rows: list[list[Cell]] = []
    for job in jobs:
        step: list[Cell] = [("–" if job.step is None else job.step)] if trained else []
        values: list[Cell] = [job.figures.get(name, "–") for name in figures]
        asked = [job.overrides.get(key, "–") for key in keys]
        rows.append(
            [
                job.directory.name,
                *asked,
                job.status,
                *([job.error] if has_errors else []),
                *step,
                *values,
            ]
        )
    columns = ["job", *keys, "status", *(["error"] if has_errors else []),
               *(["step"] if trained else []), *figures]  # fmt: skip
    caption = "A click on a column sorts by it. " + (
        f"Last value of each metric; {LOSS} is the loss of the averaged weights."
        if trained
        else "Means over the images, of estimate/metric; standard errors are in each results.csv."
    )
    sections: list[Section] = [Table("Jobs", caption, columns, rows)]
    series = {f"{job.directory.name}: {_name(job, keys)}": job.losses for job in jobs}
    series = {name: losses for name, losses in series.items() if losses[0]}
    if series:
        caption = "Validation loss of the averaged weights."
        sections.append(
            LineChart("Training", caption, "optimizer steps", LOSS, series, log_y=True)
        )
    sections += _charts(jobs, keys, figures)
    fixed = {k: v for k, v in jobs[0].overrides.items() if k not in keys}
    if fixed:
        sections.append(KeyValueSection("The same in all jobs", fixed))
    return sections


def _charts(jobs: Sequence[Job], keys: Sequence[str], figures: Sequence[str]) -> list[LineChart]:
    """Metrics over the swept value if one numeric key differs, otherwise over the jobs."""
    numbers = [key for key in keys if all(_is_number(job.overrides.get(key)) for job in jobs)]
    x_label = numbers[0] if len(numbers) == 1 else "job"
    others = [key for key in keys if key != x_label] if x_label != "job" else []
    kinds: dict[str, list[str]] = {}  # names of the figures by metric
    for name in figures:
        metric = name if name.startswith("val/") else name.rpartition("/")[2]
        if metric == LOSS or metric.removeprefix("val/").startswith(CHARTS):
            kinds.setdefault(metric, []).append(name)
    caption = ""
    if x_label == "job" and len(jobs) <= NAMED:
        caption = "; ".join(f"{job.directory.name}: {_name(job, keys)}" for job in jobs)
    values = [float(job.overrides[x_label]) for job in jobs] if x_label != "job" else [0.0]
    log_x = min(values) > 0 and max(values) >= WIDE * min(values)
    curves = []
    for metric, names in kinds.items():
        if others and len(names) > 1:
            wanted = [f"{estimate}/{metric}" for estimate in ESTIMATES]
            names = [next((name for name in wanted if name in names), names[0])]
        series: dict[str, tuple[list[float], list[float]]] = {}
        for job in jobs:
            x = job.directory.name if x_label == "job" else job.overrides[x_label]
            for name in names:
                if name in job.figures and _is_number(x):
                    label = ", ".join(filter(None, [_name(job, others), name]))
                    xs, ys = series.setdefault(label, ([], []))
                    xs.append(float(x))
                    ys.append(job.figures[name])
        if any(len(xs) > 1 for xs, _ in series.values()):
            ordered = {}
            for name, (xs, ys) in series.items():
                points = sorted(zip(xs, ys, strict=True))
                ordered[name] = ([x for x, _ in points], [y for _, y in points])
            title = f"{metric} over {x_label}"
            text = caption
            if metric in HIGHER_IS_BETTER:
                better = "Higher" if HIGHER_IS_BETTER[metric] else "Lower"
                text = f"{better} is better. {caption}".rstrip()
            curves.append(LineChart(title, text, x_label, metric, ordered, log_x=log_x))
    return curves


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
