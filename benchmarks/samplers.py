"""Fréchet distance and time of samplers, for runs of several schedules.

    python benchmarks/samplers.py <run directory> [<run directory> ...]

The runs have the same data and budget and one schedule each. Every sampler draws N images from
each run for each of three seeds; the reference is the EfficientNet-Lite0 features of all test
images. The distance of N training images is a lower bound of what can be expected. Writes
benchmarks/results/samplers.md, docs/results.md and the README's short table.
"""

import platform
import sys
import time
from statistics import mean, stdev

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, ROOT, write_block
from diffusion_lab.data.images import Split
from diffusion_lab.denoiser import Denoiser, Rescheduled
from diffusion_lab.metric import EfficientNetLite0, Moments, frechet_distance
from diffusion_lab.pixels import to_uint8
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.runs import rebuild
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.sampler import DDIM, SEEDS, Ancestral, DPMSolver, Heun, Sampler, UniPC
from diffusion_lab.sampler.time_grid import LogSNR
from diffusion_lab.schedule import EDM

IMAGES, SEEDS_TAKEN, BATCH, SHAPE = 128, 3, 64, (3, 32, 32)
LOWER = 10.0  # σ/α of the rows that start lower than t = 1
SAMPLERS: dict[str, Sampler] = {
    "ancestral, 250": Ancestral(250, clip=True),
    "ddim, 50": DDIM(50, clip=True),
    "dpm_solver, 20": DPMSolver(20, clip=True),
    "dpm_solver, SDE, 20": DPMSolver(20, stochastic=True, clip=True),
    "unipc, 20": UniPC(20, clip=True),
    "heun, 10": Heun(10, clip=True),
    "seeds, 10": SEEDS(10, clip=True),
}
# From N(0, LOWER² I) at σ/α = LOWER, below the noise levels with the largest network error.
FROM_LOWER: dict[str, Sampler] = {
    "ancestral, 250, from σ/α = 10": Ancestral(250, clip=True, grid=LogSNR()),
    "dpm_solver, SDE, 20, from σ/α = 10": DPMSolver(20, stochastic=True, clip=True),
    "dpm_solver, 20, from σ/α = 10": DPMSolver(20, clip=True),
}


SHORT = ("training images", "ancestral, 250", "ddim, 50", "dpm_solver, SDE, 20", "seeds, 10")


def features(network: EfficientNetLite0, images: Tensor) -> Moments:
    """The moments of the features of uint8 images (N, H, W, 3)."""
    moments = Moments(network.dim)
    for part in images.split(BATCH):
        moments.update(network(part))
    return moments


def draw(denoiser: Denoiser, sampler: Sampler, seed: int) -> Tensor:
    """N images, uint8, of shape (N, H, W, 3)."""
    parts = []
    for index in torch.arange(IMAGES).split(BATCH):
        generator = KeyedGenerator(make_key(seed, "generate", index))
        start = denoiser.schedule.prior((len(index), *SHAPE), generator)
        parts.append(to_uint8(sampler(denoiser, start, generator=generator)))
    return torch.cat(parts).permute(0, 2, 3, 1)


def images(split: Split, first: int = 0, count: int | None = None) -> Tensor:
    return torch.from_numpy(split[first : None if count is None else first + count])


def summary(text: str) -> str:
    """Returns the README's rows of the table: the first schedule, the samplers of SHORT."""
    head, rule, *rows = text.split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    first = next(schedule for schedule, *_ in cells if schedule)
    lines = [
        row for row, (schedule, sampler, *_) in zip(rows, cells, strict=True)
        if schedule in ("", first) and sampler in SHORT
    ]  # fmt: skip
    return "\n".join([head, rule, *lines]) + (
        "\n\nFréchet distance of EfficientNet-Lite0 features, mean and standard deviation over "
        f"{SEEDS_TAKEN} seeds of {IMAGES} images; [all samplers and schedules]"
        "(docs/results.md#samplers).\n"
    )


def write(text: str) -> None:
    """Writes the table to its pages."""
    (RESULTS / "samplers.md").write_text(text)
    write_block("samplers", text, ROOT / "docs" / "results.md")
    write_block("samplers", summary(text))


def main() -> None:
    runs = [rebuild(path) for path in sys.argv[1:]]
    network = EfficientNetLite0()
    data = instantiate(runs[0].config["data"], "data")
    data.setup("test")
    reference = features(network, images(data.images["test"]))
    least = [
        frechet_distance(features(network, images(data.images["train"], k * IMAGES, IMAGES)),
                         reference)
        for k in range(SEEDS_TAKEN)
    ]  # fmt: skip
    rows = [
        "| schedule | sampler, steps | Fréchet distance | seconds for 100 images |",
        "|---|---|---|---|",
        f"| | training images | {mean(least):.2f} ± {stdev(least):.2f} | |",
    ]
    for run in runs:
        lower = Rescheduled(run.denoiser, EDM(sigma_min=0.01, sigma_max=LOWER))
        work = [(run.denoiser, *item) for item in SAMPLERS.items()]
        work += [(lower, *item) for item in FROM_LOWER.items()]
        for denoiser, name, sampler in work:
            found, seconds = [], []
            for seed in range(SEEDS_TAKEN):
                start = time.perf_counter()
                drawn = draw(denoiser, sampler, seed)
                seconds.append((time.perf_counter() - start) * 100 / IMAGES)
                found.append(frechet_distance(features(network, drawn), reference))
            rows.append(
                f"| {type(run.denoiser.schedule).__name__.lower()} | {name} | "
                f"{mean(found):.2f} ± {stdev(found):.2f} | {mean(seconds):.1f} |"
            )
            print(rows[-1], flush=True)
    text = "\n".join(rows) + (
        f"\n\nEfficientNet-Lite0 features of {IMAGES} drawn and {reference.n} test images; mean "
        f"and standard deviation over {SEEDS_TAKEN} seeds. Distances of {IMAGES} images are "
        f"comparable among each other only. Each prior: {runs[0].origin}; on "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        '"From σ/α = 10" starts at that noise level, under schedule=edm: above it the network '
        "error is largest, and deterministic samplers do not correct it later.\n"
    )
    write(text)


if __name__ == "__main__":
    main()
