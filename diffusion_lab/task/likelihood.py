"""How probable the test images are under the prior, in bits per dimension."""

__all__ = ["Likelihood"]

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from diffusion_lab import likelihood
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.errors import ConfigError
from diffusion_lab.report.page import Table, write_report
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import ProbabilityFlow, Sampler
from diffusion_lab.task.base import Task
from diffusion_lab.task.results import average, write_results
from diffusion_lab.task.run_sections import run_sections

ESTIMATES = {
    "flow": "the probability-flow ODE with Hutchinson's trace",
    "bound": "DDPM's variational bound",
}


def solver_of(sampler: Sampler, task: str) -> ProbabilityFlow:
    """Returns the sampler if it is one that solves the ODE both ways.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(sampler, ProbabilityFlow) or not sampler.adaptive or sampler.clip:
        raise ConfigError(
            f"task={task} solves the probability-flow ODE; set sampler=probability_flow with "
            "sampler.adaptive=true and sampler.clip=false"
        )
    return sampler


class Likelihood(Task):
    """Measures bits per dimension of test images.

    Arguments:
        data: The data module whose test split is measured.
        sampler: Solves the ODE: `ProbabilityFlow`.
        num_images: How many test images.
        num_samples: How often each is measured, with other noise in its bins and another v.
        terms: Terms of the bound for each measurement; 0 leaves the bound out.
        settings: The evaluation's configuration, for the report.
        task: See `Task`.

    Raises:
        ConfigError: If there are not so many test images, or the sampler is another.
    """

    def __init__(
        self,
        *,
        data: ImageDataModule,
        sampler: Sampler,
        num_images: int,
        num_samples: int,
        terms: int,
        settings: str,
        **task: Any,
    ) -> None:
        super().__init__(**task)
        self.solver = solver_of(sampler, "likelihood")
        self.images = data.test_images(num_images)
        self.num_images, self.num_samples = num_images, num_samples
        self.terms, self.settings = terms, settings

    @property
    def count(self) -> int:
        return self.num_images

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        pixels = torch.from_numpy(self.images[index.cpu().numpy()]).to(self.device)
        pixels = pixels.permute(0, 3, 1, 2)
        found: dict[str, list[Tensor]] = {"flow": [], "bound": []}
        for m in range(self.num_samples):
            generator = KeyedGenerator(make_key(self.seed, "likelihood", index, m))
            found["flow"].append(likelihood.flow(self.denoiser, self.solver, pixels, generator))
            if self.terms:
                generator = KeyedGenerator(make_key(self.seed, "bound", index, m))
                found["bound"].append(
                    likelihood.bound(self.denoiser, pixels, generator, self.terms)
                )
        means = {name: torch.stack(values).mean(0) for name, values in found.items() if values}
        squares = (pixels.double() / 127.5 - 1).square().flatten(1).mean(1)
        return [
            {
                "bits": {name: float(values[k]) for name, values in means.items()},
                "square": float(squares[k]),
            }
            for k in range(len(index))
        ]

    def finish(self, results: list[dict[str, Any]]) -> None:
        rows = [
            average(name, "bits_per_dim", [result["bits"][name] for result in results])
            for name in results[0]["bits"]
        ]
        write_results(self.directory, rows)
        schedule = self.denoiser.schedule
        kl = schedule.prior_kl(fmean(result["square"] for result in results))
        report = write_report(
            self.directory / "report.html",
            "Likelihood of the test images",
            f"Bits per dimension of {len(results)} test images, {self.num_samples} measurement(s) "
            "of each. Both are bounds from above; the network's weights are the averaged ones.\n\n"
            f"KL(q(x_1) ‖ prior) of {type(schedule).__name__}: {kl:.3g} bits/dim.",
            [
                Table(
                    "Results",
                    "Mean over the images and its standard error.",
                    ["estimate", "what it is", "bits/dim", "n"],
                    [
                        [e, ESTIMATES[e], f"{mean:.4f} ± {error:.4f}", n]
                        for e, _, mean, error, n in rows
                    ],
                ),
                *run_sections(
                    self.run,
                    {
                        "Solver": f"Dormand-Prince, rtol {self.solver.rtol}, atol "
                        f"{self.solver.atol}",
                        "Seed": str(self.seed),
                    },
                    self.settings,
                ),
            ],
        )
        print(f"\n{'estimate':10}{'bits/dim':>10}{'stderr':>9}{'n':>6}")
        for estimate, _, mean, error, n in rows:
            print(f"{estimate:10}{mean:10.4f}{error:9.4f}{n:6d}")
        print(f"KL(q(x_1) ‖ prior): {kl:.3g} bits/dim\n\nreport: {report}")
