"""Training report: settings, pictures over the steps, and charts of the metrics.

It is written from the directory of the run alone (`.hydra`, metrics.csv, samples/), during a
training or after its end.
"""

__all__ = ["read_metrics", "try_write_training_report", "write_training_report"]

import csv
import logging
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab.errors import RunError
from diffusion_lab.report.page import (
    Animation,
    ConfigSection,
    KeyValueSection,
    LineChart,
    Picture,
    Section,
    Table,
    write_report,
)
from diffusion_lab.report.trajectory import evenly_spaced
from diffusion_lab.runs import FINISHED_FILE
from diffusion_lab.runs.typed_config import read_config, read_overrides, resolve_references

log = logging.getLogger(__name__)

FRAMES = 12  # maximum of an animation; keeps the page small enough to send by e-mail
STRETCHES = 60  # maximum of points of the training loss, each the mean of an interval
LEVELS = 5  # number of steps at which the loss over the noise level is drawn

Series = tuple[list[int], list[float]]  # steps, values

PICTURES = {  # samples/<name>-<step>.png
    "grid": (
        "Samples of the prior",
        "Drawn by the averaged weights from the same noise at every step.",
    ),
    "progressive": ("From noise to images", "Sampling trajectories: x_t and E[x_0 | x_t]."),
    "levels": ("Denoising at several noise levels", "E[x_0 | x_t] of noisy validation images."),
    "denoise": (
        "Denoised validation images",
        "Validation images with σ_t = 0.5: E[x_0 | y] and samples of the posterior.",
    ),
    "nearest": (
        "Nearest training images",
        "Samples and the training images nearest to each; a memorized image would be among them.",
    ),
    "schedule": ("Noise schedule", "The schedule of this training."),
}
CHARTS = [  # title, y axis, caption, pattern of the columns, whether logarithmic
    ("Learning rate", "learning rate", "Learning rate of the step.", r"train/lr|lr-.*", False),
    ("Gradient norm", "norm", "Before clipping.", r"train/grad_norm", True),
    ("Distance from the images", "distance",
     "Between samples and training images; the name has their number. Smaller is better.",
     r"val/(?:fid|frechet|kid)_.*", False),
    ("Throughput", "images / s", "On all devices, training steps only.", r"perf/images_per_second",
     False),
    ("Device utilization", "fraction of the peak",
     "Operations of the network over the peak of the device (MFU).", r"perf/mfu", False),
    ("Memory", "GB", "Peak memory of a device so far.", r"perf/memory_gb", False),
]  # fmt: skip
ELSEWHERE = re.compile(  # columns with a chart elsewhere, or without a chart
    r"step|epoch|(?:train|val)/loss(?:_ema|_bin/.*)?|train/images|train/skipped|perf/tflops"
)


def read_metrics(directory: Path) -> dict[str, Series]:
    """Returns steps and values of each column of metrics.csv.

    A step is the number of optimizer steps taken; the file has the number before the step. Without
    the file, as with logger=none, there are no columns.
    """
    if not (directory / "metrics.csv").exists():
        return {}
    with open(directory / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
    series: dict[str, Series] = {}
    for row in rows:
        for name, text in row.items():
            if name and text:
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]) + 1)
                values.append(float(text))
    return series


def write_training_report(directory: Path) -> Path:
    """Writes report.html into the directory of a training and returns its path.

    Raises:
        RunError: If the directory is not that of a training.
    """
    try:
        config = read_config(directory / ".hydra" / "config.yaml")
        overrides = read_overrides(directory / ".hydra" / "overrides.yaml")
    except FileNotFoundError as error:
        raise RunError(
            f"{directory} holds no .hydra/config.yaml; give the directory of a training, an "
            "evaluation or a sweep"
        ) from error
    metrics = read_metrics(directory)
    steps = max((series[0][-1] for series in metrics.values()), default=0)
    finished = (directory / FINISHED_FILE).exists()
    settings = resolve_references(config)
    name = settings.get("name", directory.name)
    sections = [
        *_pictures(directory / "samples", "grid"),
        *_losses(metrics),
        *_pictures(directory / "samples"),
        *_charts(metrics),
        *([_figures(metrics)] if metrics else []),
        KeyValueSection("Settings", _facts(directory, settings, overrides, finished)),
        ConfigSection("Configuration", OmegaConf.to_yaml(config)),
    ]
    summary = f"{steps:,} steps{'' if finished else ' so far; the training has not finished'}."
    if not metrics:
        summary = "Nothing has been logged: logger=none, or the training has just started."
    if "val/loss_ema" in metrics:
        at, values = metrics["val/loss_ema"]
        least = min(range(len(values)), key=values.__getitem__)
        summary += (
            f" The validation loss of the averaged weights is {values[-1]:.4g}; the least was "
            f"{values[least]:.4g} at step {at[least]:,}."
        )
    return write_report(directory / "report.html", f"Training of {name}", summary, sections)


def try_write_training_report(directory: Path) -> None:
    """Writes the report at the end of a training; logs a warning if that fails."""
    try:
        log.info("report: %s", write_training_report(directory))
    except (OSError, RunError, ValueError) as error:
        log.warning("report.html is not written: %s", error)


def _pictures(folder: Path, only: str | None = None) -> list[Section]:
    """Pictures of one kind over the steps, or of all kinds except the grid."""
    kinds: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        kind, _, step = path.stem.rpartition("-")
        if not step.isdigit():
            kind, step = path.stem, "0"
        kinds.setdefault(kind, {})[int(step)] = path
    order = [*PICTURES, *sorted(kinds.keys() - PICTURES.keys())]
    sections: list[Section] = []
    for kind in order:
        if kind not in kinds or (kind == only) != (only is not None):
            continue
        if only is None and kind == "grid":
            continue
        title, caption = PICTURES.get(kind, (kind, ""))
        paths = kinds[kind]
        if len(paths) == 1:
            sections.append(Picture(title, caption, next(iter(paths.values()))))
            continue
        frames = [(f"step {step:,}", _opened(paths[step]))
                  for step in evenly_spaced(sorted(paths), FRAMES)]  # fmt: skip
        sections.append(Animation(title, caption, frames))
    return sections


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def _stretches(series: Series, most: int) -> list[Series]:
    """Splits a series into at most `most` pieces of nearly equal length."""
    steps, values = series
    count = min(most, len(steps))
    ends = [round(k * len(steps) / count) for k in range(count + 1)]
    return [(steps[a:b], values[a:b]) for a, b in pairwise(ends)]


def _losses(metrics: Mapping[str, Series]) -> list[Section]:
    """The loss over the steps, and over the noise level at some steps."""
    lines: dict[str, Series] = {}
    if "train/loss" in metrics:
        pieces = _stretches(metrics["train/loss"], STRETCHES)
        lines["training"] = ([s[-1] for s, _ in pieces], [fmean(v) for _, v in pieces])
    for key, label in (("val/loss", "raw"), ("val/loss_ema", "averaged")):
        if key in metrics:
            lines[f"validation, {label} weights"] = metrics[key]
    sections: list[Section] = []
    if lines:
        caption = "Each point of the training loss is the mean since the point before."
        sections.append(LineChart("Loss", caption, "step", "loss", lines, log_y=True))
    for split, label in (("val", "Validation"), ("train", "Training")):
        prefix = f"{split}/loss_bin/"
        bins = sorted(key for key in metrics if key.startswith(prefix))
        if not bins:
            continue
        levels = [float(key.removeprefix(prefix)) for key in bins]
        # Validation losses are single measurements, training losses are means of intervals.
        parts = {key: _stretches(metrics[key], LEVELS) for key in bins}
        if split == "val":
            parts = {key: [([s], [v]) for s, v in evenly_spaced(
                list(zip(*metrics[key], strict=True)), LEVELS)] for key in bins}  # fmt: skip
        moments = min(map(len, parts.values()))
        series = {
            f"step {parts[bins[0]][k][0][-1]:,}": (
                levels, [fmean(parts[key][k][1]) for key in bins]
            ) for k in range(moments)
        }  # fmt: skip
        caption = "Each point is a tenth of the training's noise levels, at its upper end: " + (
            "averaged weights." if split == "val" else "means up to the step."
        )
        axis = "fraction of the training's noise levels below"
        title = f"{label} loss by noise level"
        sections.append(LineChart(title, caption, axis, "loss", series, log_y=True))
    return sections


def _charts(metrics: Mapping[str, Series]) -> list[Section]:
    """Charts of all other columns: those of `CHARTS` first, then one per column."""
    sections: list[Section] = []
    left = {key: series for key, series in metrics.items() if not ELSEWHERE.fullmatch(key)}
    for title, axis, caption, pattern, log in CHARTS:
        found = {key: left.pop(key) for key in list(left) if re.fullmatch(pattern, key)}
        if found:
            sections.append(LineChart(title, caption, "step", axis, found, log_y=log))
    caption = "Logged values."
    return sections + [
        LineChart(key, caption, "step", key, {key: left[key]}) for key in sorted(left)
    ]


def _figures(metrics: Mapping[str, Series]) -> Table:
    """The last and the smallest value of every column."""
    rows: list[list[str | float | int]] = []
    for key in sorted(metrics.keys() - {"step", "epoch"}):
        steps, values = metrics[key]
        least = min(range(len(values)), key=values.__getitem__)
        rows.append([key, f"{values[-1]:.4g}", f"{values[least]:.4g}", steps[least], len(values)])
    columns = ["figure", "last", "least", "at step", "values"]
    return Table("Figures", "Everything that was logged.", columns, rows)


def _facts(
    directory: Path, settings: dict[str, Any], overrides: list[str], finished: bool
) -> dict[str, str]:
    """Settings of the training."""

    def of(key: str) -> Any:
        node: Any = settings
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def kind(key: str) -> str:
        return str(of(f"{key}._target_") or "none").rpartition(".")[2]

    facts = {
        "Directory": str(directory.absolute()),
        "State": "finished" if finished else "not finished",
        "Command": shlex.join(["python", "train.py", *overrides]),
    }
    for k, path in enumerate(sorted(directory.glob(".hydra/resumed-*/overrides.yaml")), 1):
        facts[f"Continued ({k})"] = " ".join(read_overrides(path))
    batch, devices, accumulate = (
        of(k) for k in ("data.batch_size", "trainer.devices", "trainer.accumulate_grad_batches")
    )
    return facts | {
        "Data": f"{of('data.source')}, {of('data.size')} pixels",
        "Network": f"{kind('network')}, {of('network.channels')} channels x "
        f"{of('network.multipliers')}, {of('network.blocks')} block(s) a level",
        "Schedule": kind("schedule"),
        "Parameterization": kind("parameterization"),
        "Loss": f"{kind('loss')}, times {kind('time')}",
        "Optimizer": f"{kind('optimizer')}, learning rate {of('optimizer.lr')}, "
        f"{kind('lr_schedule')}",
        "Batch": f"{batch} images x {devices} device(s) x {accumulate} accumulated",
        "Averaging": f"decay {of('ema.decay')}",
        "Precision": str(of("trainer.precision")),
        "Seed": str(of("seed")),
    }
