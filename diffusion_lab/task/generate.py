"""Samples of the prior: samples.npy, a grid and the sampling trajectory."""

__all__ = ["Generate"]

import logging
import math
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.image_grid import image_grid, save_png
from diffusion_lab.report.page import Picture, write_report
from diffusion_lab.report.trajectory import TrajectoryRecorder, trajectory_sections
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.task.base import Task, TaskArguments
from diffusion_lab.task.run_sections import run_sections

log = logging.getLogger(__name__)

SHOWN = 256  # largest number of images in the grid
RECORDED = 8  # images whose sampling trajectory is shown
# A good sample of an unclipped sampler has a few values slightly outside of [-1, 1].
MARGIN, OUTSIDE = 0.1, 0.02  # the margin, and the largest share of values beyond it


class Generate(Task):
    """Draws images from the prior.

    Arguments:
        num_samples: Number of images.
        common: See `Task`.
    """

    @checked
    def __init__(self, *, num_samples: PositiveInt, **common: Unpack[TaskArguments]) -> None:
        super().__init__(**common)
        self.num_samples = num_samples

    @property
    def count(self) -> int:
        return self.num_samples

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        generator = KeyedGenerator(make_key(self.seed, "generate", index))
        start = self.denoiser.schedule.prior((len(index), *self.shape), generator)
        recorder = None
        if int(index[0]) == 0:
            recorder = TrajectoryRecorder(self.denoiser.schedule, RECORDED)
        images = self.sampler(self.denoiser, start, generator=generator, callback=recorder)
        outside = (images.abs() > 1 + MARGIN).flatten(1).float().mean(1).tolist()
        results: list[dict[str, Any]] = [
            {"image": image, "outside": share}
            for image, share in zip(to_uint8(images).cpu(), outside, strict=True)
        ]
        if recorder:
            results[0]["path"] = recorder.result()
        return results

    def finish(self, results: list[dict[str, Any]]) -> None:
        images = torch.stack([result["image"] for result in results])
        self._check_range(sum(result["outside"] for result in results) / len(results))
        np.save(self.directory / "samples.npy", images.permute(0, 2, 3, 1).numpy())
        shown = images[:SHOWN].float() / 127.5 - 1
        path = self.directory / "samples" / "grid.png"
        path.parent.mkdir(exist_ok=True)
        save_png(image_grid(shown, math.ceil(math.sqrt(len(shown)))), path)
        name, trajectory = type(self.sampler).__name__, results[0].get("path")
        schedule = self.denoiser.schedule
        report = write_report(
            self.directory / "report.html",
            "Samples of the prior",
            f"{len(images)} images drawn from noise by {name} in {self.sampler.steps} steps.",
            [
                Picture("Samples", f"The first {len(shown)} of {len(images)} images.", path),
                *(
                    trajectory_sections(trajectory, schedule, path.parent, {})
                    if trajectory
                    else []
                ),
                *run_sections(
                    self.run, {"Sampler": name, "Steps": str(self.sampler.steps)}, self.settings
                ),
            ],
        )
        print(f"\nsamples: {self.directory / 'samples.npy'}\nreport: {report}")

    def _check_range(self, outside: float) -> None:
        """Warns of samples that leave the range of the data, in which they are clipped."""
        if outside > OUTSIDE:
            log.warning(
                "%.0f%% of the values of the samples are outside of [-1, 1] by more than %g: the "
                "sampler %s has amplified errors of the network; set sampler.clip=true, more "
                "sampler.steps, or another sampler=",
                100 * outside, MARGIN, type(self.sampler).__name__,
            )  # fmt: skip
