r"""Restoration by posterior sampling, graded against the clean images.

For each image x_0 and its observation y = A(x_0) + noise: M samples of p(x_0 | y), their mean and
spread, and for a noisy image the estimate E[x_0 | y] by one call of the network. For an exact
posterior, one sample has 3.01 dB less PSNR than E[x_0 | y], the mean of M samples has
10 log10(1 + 1/M) dB less, and the rank of the truth among the samples is uniform.
"""

__all__ = ["Restoration"]

import logging
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.guidance import MMSE, Guidance, Observation
from diffusion_lab.metric import SSIM_WINDOW
from diffusion_lab.noise_level import NoiseLevel
from diffusion_lab.operator import Identity, Operator
from diffusion_lab.operator.noise_model import Noise
from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.page import write_report
from diffusion_lab.report.trajectory import TrajectoryRecorder
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import State
from diffusion_lab.task.base import Task, TaskArguments
from diffusion_lab.task.observations import ObservationSource, PriorPairs
from diffusion_lab.task.restore_report import sections, tables
from diffusion_lab.task.restore_scores import Scorer
from diffusion_lab.task.restore_table import exact_values, print_rows, result_rows
from diffusion_lab.task.results import write_results
from diffusion_lab.task.run_sections import run_sections

log = logging.getLogger(__name__)

SHOWN = 8  # images of the grid
SHOWN_SAMPLES = 4  # samples of each of them


class Restoration(Task):
    """Base class of the tasks that sample posteriors of images.

    Arguments:
        operator: The operator A.
        noise: The noise model of y.
        guidance: The posterior method.
        source: Clean images and observations.
        num_images: Number of images.
        num_samples: Number M of posterior samples of each image; 1 for deterministic methods.
        level: The noise level of a noisy image; None for other operators.
        common: See `Task`.

    Raises:
        ConfigError: If the images are smaller than the window of SSIM, or the method is not
            defined for the operator and the noise.
    """

    uses_operator: ClassVar[bool] = True

    def __init__(
        self,
        *,
        operator: Operator,
        noise: Noise,
        guidance: Guidance,
        source: ObservationSource,
        num_images: int,
        num_samples: int,
        level: NoiseLevel | None = None,
        **common: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**common)
        if min(self.shape[1:]) < SSIM_WINDOW:
            raise ConfigError(
                f"data.size={self.shape[-1]} of the run is smaller than the window of SSIM; "
                f"restoration is graded on images of at least {SSIM_WINDOW} pixels"
            )
        self.operator, self.noise, self.level = operator, noise, level
        self.guidance, self.source = guidance, source
        self.num_images, self.num_samples = num_images, num_samples
        if not guidance.stochastic and num_samples > 1:
            log.info("guidance %s is deterministic: num_samples=1", type(guidance).__name__)
            self.num_samples = 1
        self.scorer = Scorer(
            self.denoiser, operator, noise, self.num_samples, self.seed, min(self.shape[1:])
        )
        try:
            y = operator(torch.zeros(1, *self.shape))
            guidance.check(Observation(y, noise.std(y), operator))
            guidance.check_sampler(self.sampler)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.has_estimate = isinstance(operator, Identity) and self._has_level(noise.std(y))

    def _has_level(self, sigma_y: float | Tensor) -> bool:
        """Whether σ_y is one noise level of the schedule: the network then gives E[x_0 | y]."""
        low, high = self.denoiser.schedule.ratio_range()
        return isinstance(sigma_y, float) and low <= sigma_y <= high

    @property
    def count(self) -> int:
        return self.num_images

    @property
    def group_size(self) -> int:
        return max(1, self.batch_size // self.num_samples)

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        x_0, y = self.source(index)
        recorder = TrajectoryRecorder(self.denoiser.schedule) if int(index[0]) == 0 else None
        samples = self._sample(y, index, recorder)
        finite = samples.flatten(1).isfinite().all(1)
        samples = torch.where(finite[:, None, None, None, None], samples, 0.0)
        estimates = {"mean": samples.mean(1)}
        if self.has_estimate:
            observation = Observation(y, self.noise.std(y), self.operator)
            estimates["mmse"] = MMSE().estimate(self.denoiser, observation)
        results: list[dict[str, Any]] = [{"finite": bool(each)} for each in finite]
        if x_0 is not None:
            scores = self.scorer(x_0, y, samples, estimates, index, self.batch_size)
            for result, score in zip(results, scores, strict=True):
                result |= score
        for k, (number, result) in enumerate(zip(index.tolist(), results, strict=True)):
            if number < SHOWN and finite[k]:
                clean = None if x_0 is None else x_0[k]
                row = {name: estimate[k] for name, estimate in estimates.items()}
                result["shown"] = self._shown(clean, y[k : k + 1], samples[k], row)
                result["std"] = samples[k].std(0, correction=int(self.num_samples > 1)).cpu()
            result["sample"] = to_uint8(samples[k, 0]).cpu()
            if number == 0 and recorder:
                result["path"] = recorder.result()
        return results

    def _sample(
        self, y: Tensor, index: Tensor, callback: Callable[[State], None] | None
    ) -> Tensor:
        """M samples for each y, of shape (G, M, C, H, W), at most `batch_size` at once.

        The samples of an image on which the method diverged are NaN; those of the other images do
        not depend on it.
        """
        number = torch.arange(self.num_samples, device=index.device).repeat(len(index))
        image = index.repeat_interleave(self.num_samples)
        keys = make_key(self.seed, "posterior", image, number)
        repeated = y.repeat_interleave(self.num_samples, 0)
        # Samples that share particles stay together.
        size = len(keys) if self.guidance.share_particles else self.batch_size
        parts = zip(torch.split(repeated, size), torch.split(keys, size), strict=True)
        samples = [
            self._sample_rows(y_part, key, callback if k == 0 else None)
            for k, (y_part, key) in enumerate(parts)
        ]
        return torch.unflatten(torch.cat(samples), 0, (len(y), self.num_samples))

    def _sample_rows(
        self, y: Tensor, key: Tensor, callback: Callable[[State], None] | None
    ) -> Tensor:
        group = self.num_samples if self.guidance.share_particles else 1
        observation = Observation(y, self.noise.std(y), self.operator, group)
        try:
            return self.guidance(
                self.denoiser, self.sampler, observation, generator=KeyedGenerator(key),
                callback=callback,
            )  # fmt: skip
        except SamplingError as error:
            if len(y) == group:
                log.warning("an image is skipped: %s", error)
                return y.new_full((len(y), *self.shape), float("nan"))
            rows = zip(torch.split(y, group), torch.split(key, group), strict=True)
            return torch.cat([self._sample_rows(*row, None) for row in rows])

    def _shown(
        self, x_0: Tensor | None, y: Tensor, samples: Tensor, estimates: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The columns of one image in the grid of the report."""
        columns = {} if x_0 is None else {"clean": x_0}
        identity = isinstance(self.operator, Identity)
        columns["noisy" if identity else "observed"] = self.operator.to_image(y)[0]
        columns |= {"E[x_0 | y]": estimates["mmse"]} if self.has_estimate else {}
        columns[f"mean of {self.num_samples}"] = estimates["mean"]
        count = min(SHOWN_SAMPLES, self.num_samples)
        columns |= {f"sample {m + 1}": samples[m] for m in range(count)}
        return {name: image.float().cpu() for name, image in columns.items()}

    def finish(self, results: list[dict[str, Any]]) -> None:
        finite = [result for result in results if result["finite"]]
        rows = result_rows(results, self.num_samples)
        write_results(self.directory, rows)
        name, operator = type(self.guidance).__name__, type(self.operator).__name__
        noise, sampler = str(self.level or self.noise), type(self.sampler).__name__
        identity = isinstance(self.operator, Identity)
        observed = "with" if identity else f"observed by {operator} with"
        truth = "drawn from the prior's own chain, " if isinstance(self.source, PriorPairs) else ""
        pictures = sections(
            finite, self.directory / "samples", schedule=self.denoiser.schedule, seed=self.seed,
            identity=identity, level=self.level,
        ) if finite else []  # fmt: skip
        settings = {
            "Operator": operator,
            "Noise": noise,
            "Method": name,
            "Sampler": f"{sampler}, {self.sampler.steps} steps",
            "Seed": str(self.seed),
        }
        report = write_report(
            self.directory / "report.html",
            f"{'Denoising' if identity else operator} by posterior sampling, {name}",
            f"{len(results)} image(s), {truth}{observed} noise {noise} (sigma_y is "
            f"the noise added on the scale of [-1, 1]); {self.num_samples} posterior sample(s) of "
            f"each by {name} with {sampler} in {self.sampler.steps} steps.\n\n"
            "For an exact posterior sampler one sample is 3.01 dB below E[x_0 | y] and the mean "
            "of M samples 10 log10(1 + 1/M) dB; the error of the network lowers the first figure.",
            [
                *tables(rows, exact_values(self.num_samples)),
                *pictures,
                *run_sections(self.run, settings, self.settings),
            ],
        )
        print(f"\nnoise: {noise}\n")
        print_rows(rows)
        print(f"\nreport: {report}")
