"""Likelihood of test images under the prior, in bits per dimension."""

__all__ = ["Likelihood", "ode_solver"]

from statistics import fmean
from typing import Any, Unpack

import torch
from torch import Tensor

from diffusion_lab import likelihood
from diffusion_lab.constraints import NonNegativeInt, PositiveInt, checked
from diffusion_lab.errors import ConfigError
from diffusion_lab.report.page import Table, write_report
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import ProbabilityFlow, Sampler
from diffusion_lab.task.base import Task, TaskArguments
from diffusion_lab.task.results import average, write_results
from diffusion_lab.task.run_sections import run_sections

ESTIMATES = {
    "flow": "the probability-flow ODE with Hutchinson's trace",
    "bound": "DDPM's variational bound",
}


def ode_solver(sampler: Sampler, task: str) -> ProbabilityFlow:
    """Returns the sampler if it solves the probability-flow ODE in both directions.

    Raises:
        ConfigError: If it does not.
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
        num_images: Number of test images.
        num_samples: Number of measurements of each image, with independent dequantization noise
            and probe vectors.
        terms: Number of terms of the variational bound in each measurement; 0 omits the bound.
        common: See `Task`; the sampler is an adaptive `ProbabilityFlow`.

    Raises:
        ConfigError: If there are too few test images, or the sampler is another one.
    """

    @checked
    def __init__(
        self,
        *,
        num_images: PositiveInt,
        num_samples: PositiveInt,
        terms: NonNegativeInt,
        **common: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**common)
        self.solver = ode_solver(self.sampler, "likelihood")
        self.images = common["open_data"]().test_images(num_images)
        self.num_images, self.num_samples, self.terms = num_images, num_samples, terms

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
            "of each. Both are upper bounds; the network has the averaged weights.\n\n"
            f"KL(q(x_1) ‖ prior) of {type(schedule).__name__}: {kl:.3g} bits/dim.",
            [
                Table(
                    "Results",
                    "Mean over the images and its standard error.",
                    ["estimate", "method", "bits/dim", "n"],
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
