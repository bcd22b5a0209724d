"""Posterior samples against total-variation denoising, for one run.

    python benchmarks/denoising.py [run directory]

Evaluates the newest finished run at sigma_t = 0.5 on 64 test images with 8 posterior samples each,
denoises the same noisy images with Chambolle's total-variation method at the best of many weights,
and writes benchmarks/results/denoising.md, the README's table, and the images of docs/images.
"""

import csv
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_tv_chambolle

from benchmarks.machine import RESULTS, ROOT, write_block
from diffusion_lab.data.faces import draw_faces
from diffusion_lab.metric import psnr, ssim
from diffusion_lab.pixels import to_model
from diffusion_lab.report.image_grid import image_grid, save_png
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.runs import newest_run, rebuild
from diffusion_lab.runs.instantiate import instantiate

IMAGES, SAMPLES, SIGMA_T = 64, 8, 0.5
WEIGHTS = np.arange(0.3, 1.21, 0.1)
NAMES = {
    "noisy": "noisy image",
    "tv": "total variation (Chambolle), best weight",
    "sample": "one posterior sample",
    "mean": f"mean of {SAMPLES} posterior samples",
    "mmse": "E[x₀ given y], one network call",
}


def evaluate(task: str, run: Path, directory: Path, *overrides: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, str(ROOT / "eval.py"), f"task={task}", f"run={run}"]
    subprocess.run([*command, f"hydra.run.dir={directory}", *overrides], check=True)


def total_variation(run: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The best weight, and each image's scores at it, on the evaluation's noisy images."""
    data = instantiate(rebuild(run).config["data"], "data")
    data.setup("test")
    index = torch.arange(IMAGES)
    x_0 = to_model(torch.tensor(data.images["test"][:IMAGES]))
    noise = KeyedGenerator(make_key(0, "observation", index)).normal(*x_0.shape[1:])
    y = x_0 + SIGMA_T / (1 - SIGMA_T**2) ** 0.5 * noise
    best = (-np.inf, 0.0, {})
    for weight in WEIGHTS:
        images = [
            denoise_tv_chambolle(
                image.permute(1, 2, 0).double().numpy(),
                weight=weight, eps=1e-6, max_num_iter=1000, channel_axis=2,
            )
            for image in y
        ]  # fmt: skip
        estimate = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float()
        scores = {"psnr": psnr(estimate, x_0), "ssim": ssim(estimate, x_0)}
        best = max(best, (float(scores["psnr"].mean()), weight, scores), key=lambda b: b[0])
    return best[1], best[2]


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else newest_run()
    work = Path("outputs/benchmark")
    evaluate(
        "denoise", run, work / "denoise",
        f"sigma_t={SIGMA_T}", f"num_images={IMAGES}", f"num_samples={SAMPLES}",
    )  # fmt: skip
    evaluate("generate", run, work / "generate", "num_samples=64")

    results = {}
    with open(work / "denoise" / "results.csv", newline="") as file:
        for row in csv.DictReader(file):
            results[row["estimate"], row["metric"]] = (float(row["mean"]), float(row["stderr"]))
    weight, scores = total_variation(run)
    for metric, values in scores.items():
        error = float(values.std() / len(values) ** 0.5)
        results["tv", metric] = (float(values.mean()), error)

    finished = json.loads((run / "finished.json").read_text())
    lines = ["| estimate | PSNR (dB) | SSIM |", "|---|---|---|"]
    for key, name in NAMES.items():
        cells = [f"{results[key, m][0]:.2f} ± {results[key, m][1]:.2f}" for m in ("psnr", "ssim")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    gain = results["mmse", "psnr"][0] - results["tv", "psnr"][0]
    below = results["mmse", "psnr"][0] - results["sample", "psnr"][0]
    apart = round(results["mmse", "psnr"][0] - results["mean", "psnr"][0], 2) + 0.0  # not -0
    lines += [
        "",
        f"{IMAGES} test images, sigma_t = {SIGMA_T}; mean ± standard error. E[x₀ given y] is "
        f"{gain:.2f} dB above total variation (weight {weight:.1f}); one sample is {below:.2f} dB "
        f"below it (exact posterior: 3.01), the mean of {SAMPLES} {apart:.2f} dB (exact: 0.51). "
        f"After {finished['step']:,} steps on {platform.machine()}, torch {torch.__version__}.",
    ]
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "denoising.md").write_text(text)
    write_block("denoising", text)

    images = ROOT / "docs" / "images"
    shutil.copy(work / "denoise" / "samples" / "grid.png", images / "denoise.png")
    shutil.copy(work / "denoise" / "samples" / "denoising.png", images / "denoising.png")
    shutil.copy(work / "generate" / "samples" / "grid.png", images / "generate.png")
    faces = to_model(draw_faces(torch.arange(64)))
    save_png(image_grid(faces, 16), images / "faces.png")
    print(text)


if __name__ == "__main__":
    main()
