"""Tables, pictures and charts in the report of a restoration."""

__all__ = ["sections", "tables"]

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.metric import expected_coverage
from diffusion_lab.noise_level import NoiseLevel
from diffusion_lab.pixels import to_model
from diffusion_lab.report.image_grid import labelled_grid, save_png, std_map
from diffusion_lab.report.page import LineChart, Picture, Section, Table
from diffusion_lab.report.trajectory import time_caption, trajectory_sections
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import Schedule
from diffusion_lab.task.restore_table import ESTIMATES, RANK_KINDS, rank_counts
from diffusion_lab.task.results import Row
from diffusion_lab.transition import transition

COLUMNS = 9  # times of the diffusion row
BESIDE = ("clean", "noisy", "observed")  # images shown next to the trajectory of a sample


def tables(rows: Sequence[Row], exact: str) -> list[Table]:
    """Returns a table of the metrics that several estimates have, and one of the other values.

    Arguments:
        rows: The rows of results.csv.
        exact: The values of an exact sampler, for the second caption.
    """
    values = {
        (row.estimate, row.metric): f"{row.mean:.3f}"
        if row.stderr != row.stderr
        else f"{row.mean:.3f} ± {row.stderr:.3f}"
        for row in rows
    }
    counts = {(row.estimate, row.metric): row.n for row in rows}
    occurrences = Counter(metric for _, metric in values)
    shared = [metric for metric, count in occurrences.items() if count > 1]
    single = [key for key in values if key[1] not in shared]
    found = []
    if shared:
        names = [e for e in ESTIMATES if any((e, metric) in values for metric in shared)]
        body = [[e, *(values.get((e, metric), "–") for metric in shared)] for e in names]
        n = max(counts[key] for key in values if key[1] in shared)
        described = "; ".join(f"{e}: {ESTIMATES[e]}" for e in names)
        caption = f"Mean over {n} image(s) and its standard error. PSNR in dB; nothing is clipped."
        found.append(Table("Results", f"{caption} {described}.", ["estimate", *shared], body))
    columns = ["metric", "of", "value", "n"]
    other = [(metric, e, values[e, metric], counts[e, metric]) for e, metric in single]
    described = "; ".join(f"{e}: {ESTIMATES[e]}" for e in dict.fromkeys(e for e, _ in single))
    caption = f"Metrics of one estimate each. {described}. {exact}".strip()
    found.append(Table("Uncertainty and failures", caption, columns, other))
    return found


def sections(
    results: list[dict[str, Any]],
    folder: Path,
    *,
    schedule: Schedule,
    seed: int,
    identity: bool,
    level: NoiseLevel | None,
) -> list[Section]:
    """Returns the pictures and charts of a restoration.

    Arguments:
        results: The results of the images whose samples are finite, in order.
        folder: Directory of the PNG files.
        schedule: The schedule of the evaluation.
        seed: The seed of the evaluation.
        identity: Whether the operator is the identity: then the forward process is shown.
        level: The noise level of a noisy image; None for other operators.
    """
    folder.mkdir(exist_ok=True)
    shown = [result for result in results if "shown" in result]
    found: list[Section] = [_images(shown, level, folder)] if shown else []
    if any("ranks" in result for result in results):
        found += _calibration([result for result in results if "ranks" in result])
    if identity and shown and "clean" in shown[0]:
        x_0 = to_model(shown[0]["clean"].permute(1, 2, 0)[None])[0]
        found.append(_diffusion(schedule, x_0, seed, folder))
    if shown and shown[0].get("path"):  # the trajectory of the first sample of the first image
        beside = {k: v for k, v in shown[0]["shown"].items() if k in BESIDE}
        found += trajectory_sections(shown[0]["path"], schedule, folder, beside)
    return found


def _images(shown: list[dict[str, Any]], level: NoiseLevel | None, folder: Path) -> Picture:
    maps, largest = std_map(torch.stack([result["std"] for result in shown]))
    # Everything is shown at the size of x_0: small observations are enlarged by their operator.
    rows = [
        torch.cat([torch.stack(list(result["shown"].values())), m[None]])
        for result, m in zip(shown, maps, strict=True)
    ]
    columns = [*shown[0]["shown"], "std"]
    stated = f"; {level}" if level else ""
    return Picture(
        "Images",
        f"The observation is y, clipped for display{stated}. The last column is the standard "
        f"deviation of the samples, mean over the channels: dark blue is 0, pale yellow "
        f"{largest:.3f}.",
        save_png(labelled_grid(rows, columns), folder / "grid.png"),
    )


def _calibration(results: list[dict[str, Any]]) -> list[LineChart]:
    """Rank histograms and the coverage of random balls, over all images."""
    series = {}
    for kind, name in RANK_KINDS.items():
        counts = rank_counts(results, kind)
        places = torch.linspace(0, 1, len(counts)).tolist()
        series[name] = (places, (counts / counts.float().mean()).tolist())
    ranks = LineChart(
        "Rank histograms",
        "How often the truth has a rank among the samples, from below all (0) to above all (1), "
        "over the mean: 1 everywhere for an exact posterior. A valley says that the samples are "
        "spread too little, a hill too much, a slope that they are shifted.",
        "rank of the truth / M",
        "frequency / mean",
        series,
    )
    samples = len(results[0]["ranks"]["pixels"]) - 1
    levels, found = expected_coverage(torch.tensor([r["tarp"] for r in results]), samples)
    balls = LineChart(
        "Expected coverage",
        "TARP: how often a ball around a random image that holds a share of the samples holds the "
        f"truth. The diagonal for an exact posterior, up to about {1.6 / len(results) ** 0.5:.2f} "
        f"for {len(results)} image(s).",
        "share of the samples",
        "share of the truths",
        {
            "found": (levels.tolist(), found.tolist()),
            "exact": (levels.tolist(), levels.tolist()),
        },
    )
    return [ranks, balls]


def _diffusion(schedule: Schedule, x_0: Tensor, seed: int, folder: Path) -> Picture:
    """The forward process on the first image: with one noise for all times, and as a path."""
    shape, zero = x_0.shape, torch.zeros(1, dtype=torch.int64)
    noise = KeyedGenerator(make_key(seed, "diffusion", zero)).normal(*shape)[0]
    generator = KeyedGenerator(make_key(seed, "diffusion path", zero))
    times = torch.linspace(0, 1, COLUMNS).tolist()
    direct, path = [], [x_0]
    for s, t in zip([0.0, *times[:-1]], times, strict=True):
        alpha_s, _, alpha_t, sigma_t, v = map(float, transition(schedule, t, s))
        direct.append(alpha_t * x_0 + sigma_t * noise)
        step = v**0.5 * generator.normal(*shape)[0]
        path.append(alpha_t / alpha_s * path[-1] + step)
    rows = [torch.stack(states) for states in (direct, path[1:])]
    captions = [time_caption(schedule, t) for t in times]
    return Picture(
        "Diffusion",
        f"x_t over t, on the schedule of the evaluation ({type(schedule).__name__}). Above, "
        "x_t = α_t x_0 + σ_t ε with one ε for all times; below, a path of the process, each x_t "
        "drawn from q(x_t | x_s) of the one before.",
        save_png(labelled_grid(rows, captions, ["one noise", "a path"]), folder / "diffusion.png"),
    )
