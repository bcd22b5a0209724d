"""Sampling trajectory: recorded while a sampler runs, and its figures in a report."""

__all__ = [
    "TrajectoryRecorder", "evenly_spaced", "time_caption", "to_unit_variance",
    "trajectory_sections",
]  # fmt: skip

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.image_grid import labelled_grid, save_png
from diffusion_lab.report.page import Animation, Picture, Section
from diffusion_lab.sampler import State
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast

T = TypeVar("T")

MAX_COLUMNS = 9  # states in the still picture
MAX_STATES = 24  # states that a recorder returns, and frames of the animation
ROW_LABELS = ["x_t", "E[x_0 | x_t]"]


class TrajectoryRecorder:
    """Sampler callback that records x_t and E[x_0 | x_t], evenly spaced over the steps.

    The number of steps need not be known: when 48 states are stored, every second one is dropped
    and the stride doubles. The states are 8-bit images on the CPU, of the first rows of the batch
    alone, because all states of a batch can take gigabytes. x_t is divided by √(α_t² + σ_t²), so
    that it has about the range of the images under every schedule. States that are not finite are
    skipped.

    Arguments:
        schedule: Noise schedule of the states.
        rows: Number of samples recorded, from the start of the batch.
        stride: Number of steps between two recorded states. The last state is always recorded.
    """

    def __init__(self, schedule: Schedule, rows: int = 1, stride: int = 1) -> None:
        self.schedule, self.rows, self.stride = schedule, rows, stride
        self.states: list[tuple[float, Tensor, Tensor]] = []
        self.count = 0
        self.last: State | None = None

    def __call__(self, state: State) -> None:
        if self.count % self.stride == 0:
            self._record(state)
            if len(self.states) == 2 * MAX_STATES:
                self.states = self.states[::2]
                self.stride *= 2
        self.count += 1
        self.last = state

    def _record(self, state: State) -> None:
        alpha_t, sigma_t = self.schedule(torch.tensor(state.t, dtype=torch.float64))
        x_t, denoised = (x[: self.rows].float() for x in (state.x_t, state.denoised))
        x_t = to_unit_variance(x_t, alpha_t, sigma_t)
        if all(bool(x.isfinite().all()) for x in (x_t, denoised)):
            self.states.append((state.t, to_uint8(x_t).cpu(), to_uint8(denoised).cpu()))

    def result(self) -> dict[str, Any]:
        """Returns `t`, and `x_t` and `denoised` as uint8 images of shape (F, rows, 3, H, W)."""
        if self.last is not None and (self.count - 1) % self.stride:
            self._record(self.last)
        if not self.states:
            return {}
        t, x_t, denoised = zip(*evenly_spaced(self.states, MAX_STATES), strict=True)
        return {"t": list(t), "x_t": torch.stack(x_t), "denoised": torch.stack(denoised)}


def trajectory_sections(
    trajectory: Mapping[str, Any], schedule: Schedule, folder: Path, beside: Mapping[str, Tensor]
) -> list[Section]:
    """Returns the trajectory of the first sample as a row, and of all samples as an animation.

    Arguments:
        trajectory: Result of `TrajectoryRecorder.result`.
        schedule: Noise schedule, for the σ_t of each time.
        folder: Folder of the picture denoising.png.
        beside: Images of shape (3, H, W) in [-1, 1] to compare a single sample with, by name.
    """
    noisy, denoised = trajectory["x_t"], trajectory["denoised"]
    captions = [time_caption(schedule, t) for t in trajectory["t"]]
    shown = evenly_spaced(range(len(captions)), MAX_COLUMNS)
    picture = labelled_grid(
        [noisy[shown, 0], denoised[shown, 0]], [captions[k] for k in shown], ROW_LABELS
    )
    others = [to_uint8(image)[None] for image in beside.values()]
    frames = []
    for k, caption in enumerate(captions):
        if noisy.shape[1] > 1:
            rows, columns = [noisy[k], denoised[k]], [""] * noisy.shape[1]
            frame = labelled_grid(rows, columns, ROW_LABELS)
        else:
            row = torch.cat([noisy[k], denoised[k], *others])
            frame = labelled_grid([row], [*ROW_LABELS, *beside])
        frames.append((caption, frame))
    caption = "Sampling trajectory of one sample, from left to right."
    return [
        Picture("Denoising", caption, save_png(picture, folder / "denoising.png")),
        Animation("Denoising, step by step", "From noise to an image, over the steps.", frames),
    ]


def to_unit_variance(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Returns x_t / √(α_t² + σ_t²), which has about the range of the images at every t."""
    return x_t / broadcast(torch.sqrt(alpha_t**2 + sigma_t**2), x_t)


def time_caption(schedule: Schedule, t: float) -> str:
    """Returns the time and its σ_t as a caption."""
    _, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
    return f"t = {t:.2f} σ = {float(sigma_t):.2f}"


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Returns at most `count` of the items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]
