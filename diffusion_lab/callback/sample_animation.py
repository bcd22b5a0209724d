"""Pictures of a training: trajectories, denoised images by noise level, nearest neighbours."""

__all__ = ["levels", "log_picture", "nearest", "progressive"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from PIL.Image import Image
from torch import Tensor

from diffusion_lab.callback.trainer_state import is_debug_run
from diffusion_lab.data.images import Split
from diffusion_lab.pixels import to_model
from diffusion_lab.report.image_grid import labelled_grid, save_png
from diffusion_lab.report.trajectory import to_unit_variance
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast
from diffusion_lab.training.loss_bins import BINS, bin_name
from diffusion_lab.training.module import DiffusionModule

CHUNK = 256  # training images that are compared at once


def log_picture(trainer: Trainer, name: str, picture: Image, path: Path) -> None:
    """Writes a picture as a PNG file, and passes it to every logger with `log_image`."""
    if is_debug_run(trainer):
        return
    save_png(picture, path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [picture], step=trainer.global_step)


def progressive(trajectory: Mapping[str, Any], schedule: Schedule) -> Image:
    """Draws x_t and E[x_0 | x_t] along the reverse process, two rows for each sample.

    Arguments:
        trajectory: Result of `TrajectoryRecorder.result`.
        schedule: Noise schedule, for the σ_t/α_t of each time.
    """
    columns = []
    for t in trajectory["t"]:
        alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
        columns.append(f"t = {t:.3g}\nσ/α = {sigma_t / alpha_t:.3g}" if t else "sample")
    rows = torch.stack([trajectory["x_t"], trajectory["denoised"]], 2).flatten(1, 2).unbind(1)
    return labelled_grid(rows, columns, ["x_t", "E[x_0 | x_t]"] * (len(rows) // 2))


@torch.no_grad()
def levels(module: DiffusionModule, x_0: Tensor, epsilon: Tensor) -> Image:
    """Draws E[x_0 | x_t] of one image, at the middle of each bin of the losses per noise level.

    Arguments:
        module: The module, of which the averaged weights are used.
        x_0: The image, of shape (1, C, H, W).
        epsilon: The noise, the same at every level, of the same shape.
    """
    u = (torch.arange(BINS, dtype=torch.float64, device=x_0.device) + 0.5) / BINS
    t, _ = module.time(u, module.schedule)
    alpha_t, sigma_t = module.schedule(t)
    x_t = broadcast(alpha_t, x_0) * x_0 + broadcast(sigma_t, x_0) * epsilon
    denoised = module.denoiser()(x_t, t)
    scaled = to_unit_variance(x_t, alpha_t, sigma_t)
    rows = [torch.cat([x_0, images]).cpu() for images in (scaled, denoised)]
    ratios = (sigma_t / alpha_t).tolist()
    columns = [f"bin {bin_name(k)}\nσ/α = {ratio:.3g}" for k, ratio in enumerate(ratios)]
    return labelled_grid(rows, ["clean", *columns], ["x_t", "E[x_0 | x_t]"])


def nearest(
    samples: Tensor, images: Split, count: int, mirrored: bool, neighbours: int = 3
) -> Image:
    """Draws samples next to the nearest training images, which shows whether they are copies.

    Arguments:
        samples: The samples, of shape (B, C, H, W).
        images: The training images.
        count: Largest number of training images that are compared, from the start of the split.
        mirrored: Whether the training images are also used mirrored.
        neighbours: Number of nearest images that are shown.
    """
    count = min(count, len(images))
    neighbours = min(neighbours, count)
    flat = samples.flatten(1)
    found = flat.new_full((len(flat), neighbours), torch.inf)
    pictures = samples.new_zeros(len(samples), neighbours, *samples.shape[1:])
    for first in range(0, count, CHUNK):
        chunk = torch.from_numpy(images[slice(first, min(first + CHUNK, count))])
        x_0 = to_model(chunk.to(samples.device))
        x_0 = torch.cat([x_0, x_0.flip(-1)]) if mirrored else x_0
        distance = torch.cdist(flat, x_0.flatten(1))
        for k in range(len(samples)):
            best = torch.cat([found[k], distance[k]]).topk(neighbours, largest=False)
            pictures[k] = torch.cat([pictures[k], x_0])[best.indices]
            found[k] = best.values
    rms = (pictures - samples[:, None]).square().flatten(2).mean(2).sqrt()[:, 0].tolist()
    rows = [torch.cat([samples[k : k + 1], pictures[k]]).cpu() for k in range(len(samples))]
    also = " and their mirror images" if mirrored else ""
    columns = ["sample", f"nearest of {count:,} training images{also}", "second", "third"]
    labels = [f"nearest: RMS {value:.2f}" for value in rms]
    return labelled_grid(rows, columns[: neighbours + 1], labels)
