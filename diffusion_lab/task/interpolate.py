r"""Interpolation between two images in the latent space of the probability-flow ODE.

The ODE maps each image to its latent x_t at a noise level r = σ_t / α_t that removes nearly all of
the image. The latents are interpolated by spherical linear interpolation (slerp),

    x_t(λ) = (sin((1 - λ) θ) x_t + sin(λ θ) x_t') / sin θ,    cos θ = <x_t, x_t'> / |x_t| |x_t'|,

and mapped back by the ODE. λ = 0 and λ = 1 reproduce the images up to the solver's tolerance. r
should not be larger than needed: an error of the network in ε̂ is r times the error in x̂, and the
ODE does not correct it.

Source:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, section 5.3 and appendix D.5.
"""

__all__ = ["Interpolate", "slerp"]

from typing import Any, Unpack

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegativeInt, Positive, PositiveInt, checked
from diffusion_lab.metric import psnr
from diffusion_lab.pixels import to_model
from diffusion_lab.report.image_grid import labelled_grid, save_png
from diffusion_lab.report.page import Picture, write_report
from diffusion_lab.task.base import Task, TaskArguments
from diffusion_lab.task.likelihood import ode_solver
from diffusion_lab.task.run_sections import run_sections


def slerp(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Returns the spherical linear interpolation of each two vectors of (B, *).

    Arguments:
        first: The vectors at λ = 0.
        last: The vectors at λ = 1, of the same shape.
        weight: λ.
    """
    a, b = first.flatten(1), last.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))[:, None]
    point = torch.sin((1 - weight) * theta) * a + torch.sin(weight * theta) * b
    return (point / torch.sin(theta)).reshape(first.shape)


class Interpolate(Task):
    """Draws rows of images that lead from one test image to the next.

    Arguments:
        num_images: Number of rows; row k joins the test images 2k and 2k + 1.
        points: Number of images between the two of a row.
        ratio: Noise level r of the latents, limited to the largest one of the schedule.
        common: See `Task`; the sampler is an adaptive `ProbabilityFlow`.

    Raises:
        ConfigError: If there are too few test images, or the sampler is another one.
    """

    @checked
    def __init__(
        self,
        *,
        num_images: PositiveInt,
        points: NonNegativeInt,
        ratio: Positive,
        **common: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**common)
        self.solver = ode_solver(self.sampler, "interpolate")
        self.images = common["open_data"]().test_images(2 * num_images)
        self.num_images, self.points = num_images, points
        schedule = self.denoiser.schedule
        self.t_max = float(schedule.t_from_ratio(min(ratio, float(schedule.ratio(1.0)))))

    @property
    def count(self) -> int:
        return self.num_images

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        both = torch.cat([2 * index, 2 * index + 1]).cpu().numpy()
        x_0 = to_model(torch.from_numpy(self.images[both]).to(self.device))
        t_min = self.denoiser.schedule.t_min
        # The image stands for x_{t_min} / α, whose noise is below the 8-bit resolution.
        alpha = float(self.denoiser.schedule(torch.tensor(t_min, dtype=torch.float64))[0])
        latent = self.solver.integrate(self.denoiser, alpha * x_0, t_min, self.t_max)
        first, last = latent.chunk(2)
        row = []
        for k in range(self.points + 2):
            between = slerp(first, last, k / (self.points + 1))
            row.append(self.solver.integrate(self.denoiser, between, self.t_max, t_min) / alpha)
        rows = torch.stack(row, 1)
        ends = torch.cat([psnr(rows[:, 0], x_0.chunk(2)[0]), psnr(rows[:, -1], x_0.chunk(2)[1])])
        ends = ends.reshape(2, -1).mean(0)
        shown = torch.cat([x_0.chunk(2)[0][:, None], rows, x_0.chunk(2)[1][:, None]], 1).cpu()
        return [{"row": images, "psnr": float(p)} for images, p in zip(shown, ends, strict=True)]

    def finish(self, results: list[dict[str, Any]]) -> None:
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        weights = [f"λ = {k / (self.points + 1):.2f}" for k in range(self.points + 2)]
        picture = labelled_grid(
            [result["row"] for result in results], ["image", *weights, "image"]
        )
        path = save_png(picture, folder / "grid.png")
        fidelity = sum(result["psnr"] for result in results) / len(results)
        report = write_report(
            self.directory / "report.html",
            "Interpolation through the latents",
            "The probability-flow ODE maps two test images to noise, the noises are interpolated "
            "spherically (slerp), and the ODE maps them back. The images at λ = 0 and 1 are "
            f"reconstructed with a PSNR of {fidelity:.1f} dB, which is the solver's error.",
            [
                Picture("Images", "One pair of test images in each row.", path),
                *run_sections(
                    self.run,
                    {"Solver": f"Dormand-Prince, rtol {self.solver.rtol}"},
                    self.settings,
                ),
            ],
        )
        print(f"\nreconstruction of the ends: {fidelity:.1f} dB\nreport: {report}")
