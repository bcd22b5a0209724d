"""A table of a sweep of restorations.

    python eval.py -m task=denoise sigma_t=0.1,0.3,0.5,0.7 truth=data,model hydra.sweep.dir=a
    python eval.py -m task=inpaint_box,deblur guidance=mmps,pigdm,dps hydra.sweep.dir=b
    python benchmarks/restorations.py calibration a
    python benchmarks/restorations.py restorations b

Writes benchmarks/results/<name>.md: what each job was asked for, and its figures.
"""

import csv
import sys
from pathlib import Path

import yaml

from diffusion_lab.metric import nominal

RESULTS = Path(__file__).parent / "results"
KEYS = ("task", "guidance", "sigma_t", "sigma_y", "truth")  # what tells the jobs apart
FIGURES = {
    "PSNR of y": ("noisy", "psnr"),
    "of a sample": ("sample", "psnr"),
    "of the mean": ("mean", "psnr"),
    "SSIM of a sample": ("sample", "ssim"),
    "CRPS": ("posterior", "crps"),
    "coverage": ("posterior", "coverage_90"),
    "spread / skill": ("posterior", "spread_skill"),
    "not finite": ("sample", "nonfinite"),
}


def job(directory: Path) -> tuple[dict[str, str], dict[tuple[str, str], float], int]:
    """What a job was asked for, its figures, and the number of its images."""
    overrides = yaml.safe_load((directory / ".hydra" / "overrides.yaml").read_text())
    asked = dict(text.split("=", 1) for text in overrides)
    with open(directory / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figures = {(row["estimate"], row["metric"]): float(row["mean"]) for row in rows}
    return asked, figures, int(rows[0]["n"])


def main() -> None:
    name, *sweeps = sys.argv[1:]
    done = sorted(
        (path.parent for sweep in sweeps for path in Path(sweep).glob("*/results.csv")),
        key=lambda path: (str(path.parent), int(path.name)),
    )
    jobs = [job(directory) for directory in done]
    keys = [key for key in KEYS if len({asked.get(key) for asked, _, _ in jobs}) > 1]
    columns = [c for c, key in FIGURES.items() if any(key in figures for _, figures, _ in jobs)]
    lines = [
        "| " + " | ".join([*keys, *columns]) + " |",
        "|" + "---|" * (len(keys) + len(columns)),
    ]
    for asked, figures, _ in jobs:
        cells = [asked.get(key, "") for key in keys]
        for column in columns:
            value = figures.get(FIGURES[column])
            digits = {"PSNR of y": 2, "of a sample": 2, "of the mean": 2, "not finite": 0}
            cells.append("" if value is None else f"{value:.{digits.get(column, 3)}f}")
        lines.append("| " + " | ".join(cells) + " |")
    config = yaml.safe_load((done[0] / ".hydra" / "config.yaml").read_text())
    samples = config["num_samples"]
    ideal = nominal(samples, 0.9)
    lines += [
        "",
        f"{jobs[0][2]} images, {samples} posterior samples of each; PSNR in dB. Coverage is that "
        f"of the central interval, ideally {ideal:.3f}; spread / skill is ideally 1.",
    ]
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
