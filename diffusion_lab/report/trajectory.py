"""The way of a sample from noise to an image: kept while it is drawn, and shown in a report."""

__all__ = ["Film", "film_sections", "moment"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.image_grid import labelled_grid, save_png
from diffusion_lab.report.page import Animation, Picture, Section
from diffusion_lab.sampler import State
from diffusion_lab.schedule import Schedule

MOMENTS = 9  # of the row
FRAMES = 24  # of the animation, at most


class Film:
    """Keeps some of a sampler's states, evenly spread over its steps; pass it as `callback`.

    How many there will be need not be known: at 2 x 24 kept states every other one goes, and half
    as many are taken from there on. They are 8-bit pictures on the CPU, of a few rows: all states
    of a batch would be gigabytes. x_t is divided by √(α_t² + σ_t²), 1 where the variance is
    preserved, so that it has about the images' range. What is not finite is left out.

    Arguments:
        schedule: The schedule of the states.
        rows: How many rows of the batch are kept, from the first.
    """

    def __init__(self, schedule: Schedule, rows: int = 1) -> None:
        self.schedule, self.rows = schedule, rows
        self.states: list[tuple[float, Tensor, Tensor]] = []
        self.count, self.every = 0, 1
        self.newest: State | None = None

    def __call__(self, state: State) -> None:
        if self.count % self.every == 0:
            self._keep(state)
            if len(self.states) == 2 * FRAMES:
                self.states = self.states[::2]
                self.every *= 2
        self.count += 1
        self.newest = state

    def _keep(self, state: State) -> None:
        alpha_t, sigma_t = self.schedule(torch.tensor(state.t, dtype=torch.float64))
        scale = float((alpha_t**2 + sigma_t**2).sqrt())
        images = [x[: self.rows].float() for x in (state.x_t / scale, state.denoised)]
        if all(bool(x.isfinite().all()) for x in images):
            self.states.append((state.t, *(to_uint8(x).cpu() for x in images)))

    def result(self) -> dict[str, Any]:
        """Returns `t`, and the states `x_t` and `denoised`, uint8, of shape (F, rows, C, H, W)."""
        if self.newest is not None and (self.count - 1) % self.every:
            self._keep(self.newest)
        if not self.states:
            return {}
        places = _spread(len(self.states), FRAMES)
        t, x_t, denoised = zip(*(self.states[k] for k in places), strict=True)
        return {"t": list(t), "x_t": torch.stack(x_t), "denoised": torch.stack(denoised)}


def film_sections(
    path: Mapping[str, Any], schedule: Schedule, folder: Path, beside: Mapping[str, Tensor]
) -> list[Section]:
    """Returns the way of the first sample as a row, and of all that were kept as an animation.

    Arguments:
        path: What `Film.result` returned.
        schedule: The schedule, for the noise level of each time.
        folder: Where denoising.png goes.
        beside: Images of shape (3, H, W) to compare a single sample with, by their names.
    """
    noisy, denoised = (path[key].float() / 127.5 - 1 for key in ("x_t", "denoised"))
    captions = [moment(schedule, t) for t in path["t"]]
    places = _spread(len(captions), MOMENTS)
    picture = labelled_grid(
        [noisy[places, 0], denoised[places, 0]],
        [captions[k] for k in places],
        ["x_t", "E[x_0 | x_t]"],
    )
    frames = []
    for k, caption in enumerate(captions):
        if noisy.shape[1] > 1:
            rows, columns = [noisy[k], denoised[k]], [""] * noisy.shape[1]
            frame = labelled_grid(rows, columns, ["x_t", "E[x_0 | x_t]"])
        else:
            others = torch.stack(list(beside.values())) if beside else noisy[0, :0]
            row = torch.cat([noisy[k], denoised[k], others])
            frame = labelled_grid([row], ["x_t", "E[x_0 | x_t]", *beside])
        frames.append((caption, frame))
    caption = "The way of one sample, from the left to the right."
    return [
        Picture("Denoising", caption, save_png(picture, folder / "denoising.png")),
        Animation("Denoising, step by step", "From noise to an image, over the steps.", frames),
    ]


def moment(schedule: Schedule, t: float) -> str:
    """Returns a time and its noise level, as a caption."""
    _, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
    return f"t = {t:.2f} σ = {float(sigma_t):.2f}"


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, with the first and the last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
