r"""Between two images through the latents of the probability-flow ODE.

Each image is carried to its latent x_t at a noise level r = σ_t / α_t at which hardly anything is
left of it, the latents are joined on the sphere,

    x_t(λ) = (sin((1 - λ) θ) x_t + sin(λ θ) x_t') / sin θ,    cos θ = <x_t, x_t'> / |x_t| |x_t'|,

and what lies between is carried back. The ends are the images themselves, up to the tolerance. r
is no larger than it needs to be: an error of the network in ε̂ is one of r times that in x̂, and at
levels of 100 and more few networks are good enough for the ODE, which has nothing to correct it.

Source:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, section 5.3 and appendix D.5.
"""

__all__ = ["Interpolate", "slerp"]

from typing import Any

import torch
from torch import Tensor

from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.metric import psnr
from diffusion_lab.pixels import to_model
from diffusion_lab.report.image_grid import labelled_grid, save_png
from diffusion_lab.report.page import Picture, write_report
from diffusion_lab.sampler import Sampler
from diffusion_lab.task.base import Task
from diffusion_lab.task.likelihood import solver_of
from diffusion_lab.task.run_sections import run_sections


def slerp(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Returns the point a share λ of the way along the arc between each two of (B, *)."""
    a, b = first.flatten(1), last.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))[:, None]
    point = torch.sin((1 - share) * theta) * a + torch.sin(share * theta) * b
    return (point / torch.sin(theta)).reshape(first.shape)


class Interpolate(Task):
    """Draws rows of images from one test image to the next.

    Arguments:
        data: The data module, of whose test split images 2k and 2k + 1 are joined.
        sampler: Solves the ODE: `ProbabilityFlow`.
        num_images: The number of rows.
        points: Images between the two of a row.
        ratio: The noise level r of the latents; the schedule's largest if that is smaller.
        settings: The evaluation's configuration, for the report.
        task: See `Task`.

    Raises:
        ConfigError: If there are too few test images, or the sampler is another.
    """

    def __init__(
        self,
        *,
        data: ImageDataModule,
        sampler: Sampler,
        num_images: int,
        points: int,
        ratio: float,
        settings: str,
        **task: Any,
    ) -> None:
        super().__init__(**task)
        self.solver = solver_of(sampler, "interpolate")
        self.images = data.test_images(2 * num_images)
        self.num_images, self.points, self.settings = num_images, points, settings
        schedule = self.denoiser.schedule
        self.t_max = float(schedule.t_from_ratio(min(ratio, float(schedule.ratio(1.0)))))

    @property
    def count(self) -> int:
        return self.num_images

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        both = torch.cat([2 * index, 2 * index + 1]).cpu().numpy()
        x_0 = to_model(torch.from_numpy(self.images[both]).to(self.device))
        t_min = self.denoiser.schedule.t_min
        # The image is taken for x_{t_min} / α, whose noise is invisible.
        alpha = float(self.denoiser.schedule(torch.tensor(t_min, dtype=torch.float64))[0])
        latent = self.solver.transport(self.denoiser, alpha * x_0, t_min, self.t_max)
        first, last = latent.chunk(2)
        row = []
        for k in range(self.points + 2):
            between = slerp(first, last, k / (self.points + 1))
            row.append(self.solver.transport(self.denoiser, between, self.t_max, t_min) / alpha)
        rows = torch.stack(row, 1)
        ends = torch.cat([psnr(rows[:, 0], x_0.chunk(2)[0]), psnr(rows[:, -1], x_0.chunk(2)[1])])
        ends = ends.reshape(2, -1).mean(0)
        shown = torch.cat([x_0.chunk(2)[0][:, None], rows, x_0.chunk(2)[1][:, None]], 1).cpu()
        return [{"row": images, "psnr": float(p)} for images, p in zip(shown, ends, strict=True)]

    def finish(self, results: list[dict[str, Any]]) -> None:
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        shares = [f"λ = {k / (self.points + 1):.2f}" for k in range(self.points + 2)]
        picture = labelled_grid([result["row"] for result in results], ["image", *shares, "image"])
        path = save_png(picture, folder / "grid.png")
        fidelity = sum(result["psnr"] for result in results) / len(results)
        report = write_report(
            self.directory / "report.html",
            "Interpolation through the latents",
            "Two test images are carried to noise by the probability-flow ODE, the noises are "
            "joined on the sphere, and what lies between is carried back. The images at λ = 0 and "
            f"1 come back with a PSNR of {fidelity:.1f} dB, which is the solver's error.",
            [
                Picture("Images", "One pair of test images in each row.", path),
                *run_sections(
                    self.run,
                    {"Solver": f"Dormand-Prince, rtol {self.solver.rtol}"},
                    self.settings,
                ),
            ],
        )
        print(f"\nthe ends come back with {fidelity:.1f} dB\nreport: {report}")
