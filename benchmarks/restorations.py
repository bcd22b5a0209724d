"""A table of a sweep of restorations.

    python eval.py -m task=denoise sigma_t=0.1,0.3,0.5,0.7 truth_source=data,model \\
        hydra.sweep.dir=a
    python eval.py -m task=inpaint_box,deblur guidance=mmps,pigdm,dps hydra.sweep.dir=b
    python benchmarks/restorations.py calibration a
    python benchmarks/restorations.py restorations b

Writes benchmarks/results/<name>.md: what each job was asked for, and its figures.
"""

import math
import sys
from pathlib import Path

import yaml

from diffusion_lab.metric import nominal_coverage
from diffusion_lab.report.sweep_report import Job, read_jobs

RESULTS = Path(__file__).parent / "results"
KEYS = (
    "task",
    "guidance",
    "sigma_t",
    "sigma_y",
    "truth_source",
    "settings",
)  # what tells jobs apart
SAME = ("run", "num_images", "num_samples", "batch_size")  # what is no setting of a method
CLOSENESS = "posterior/crps"
FIGURES = {
    "PSNR of y": "noisy/psnr",
    "of a sample": "sample/psnr",
    "of the mean": "mean/psnr",
    "SSIM of a sample": "sample/ssim",
    "CRPS": CLOSENESS,
    "coverage": "posterior/coverage_90",
    "spread / skill": "posterior/spread_skill",
    "not finite": "sample/nonfinite",
}
Row = tuple[dict[str, str], dict[str, float]]


def row(job: Job) -> Row:
    """What a job was asked for, and its figures."""
    others = {k: v for k, v in job.overrides.items() if k not in (*KEYS, *SAME)}
    settings = " ".join(f"{key.split('.')[-1]}={value}" for key, value in others.items())
    return {**job.overrides, "settings": settings}, job.figures


def table(rows: list[Row], keys: list[str]) -> list[str]:
    """The rows in order, with the columns that say something."""
    columns = [c for c, key in FIGURES.items() if any(key in figures for _, figures in rows)]
    lines = [
        "| " + " | ".join([*keys, *columns]) + " |",
        "|" + "---|" * (len(keys) + len(columns)),
    ]
    for asked, figures in rows:
        cells = [asked.get(key, "") for key in keys]
        for column in columns:
            value = figures.get(FIGURES[column])
            digits = {"PSNR of y": 2, "of a sample": 2, "of the mean": 2, "not finite": 0}
            cells.append("" if value is None else f"{value:.{digits.get(column, 3)}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    name, *sweeps = sys.argv[1:]
    jobs = [job for sweep in sweeps for job in read_jobs(Path(sweep)) if job.figures]
    # What was done twice counts as it was done last.
    rows = list({tuple(sorted(asked.items())): (asked, f) for asked, f in map(row, jobs)}.values())
    keys = [key for key in KEYS if len({asked.get(key, "") for asked, _ in rows}) > 1]
    lines: list[str] = []
    if {"task", "guidance"} <= set(keys):  # a table for each task, the closest methods first
        keys.remove("task")
        for task in dict.fromkeys(asked["task"] for asked, _ in rows):
            own = [each for each in rows if each[0]["task"] == task]
            own.sort(key=lambda each: each[1].get(CLOSENESS, math.inf))
            lines += [f"### {task}", "", *table(own, keys), ""]
    else:
        lines += [*table(rows, keys), ""]
    config = yaml.safe_load((jobs[0].directory / ".hydra" / "config.yaml").read_text())
    images, samples = config["num_images"], config["num_samples"]
    lines.append(
        f"{images} images, {samples} posterior samples of each; PSNR in dB. Coverage is that of "
        f"the central interval, ideally {nominal_coverage(samples, 0.9):.3f}; "
        "spread / skill is ideally 1."
    )
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
