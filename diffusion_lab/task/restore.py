r"""Restoration as posterior sampling, and how good it is.

For each test image x_0, y = A(x_0) + noise; M samples of p(x_0 | y), their mean and spread, and
for a noisy image the estimate E[x_0 | y] by one call. For an exact posterior one sample has
3.01 dB less PSNR than E[x_0 | y], and the mean of M samples 10 log10(1 + 1/M) dB less; the truth
takes every rank among the samples equally often.
"""

__all__ = ["Restore"]

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.guidance import MMSE, Guidance, Observation
from diffusion_lab.metric import (
    LEAST,
    WINDOW,
    EfficientNetLite0,
    Moments,
    coverage,
    crps,
    energy_score,
    extract,
    find_lpips,
    frechet_distance,
    nominal,
    projections,
    psnr,
    rank_chi2,
    rank_histogram,
    ranks,
    spread_skill,
    spread_skill_ratio,
    ssim,
    stein_discrepancy,
    tarp_ranks,
)
from diffusion_lab.noise_level import NoiseLevel
from diffusion_lab.operator import Gaussian, Identity, Operator, Poisson
from diffusion_lab.pixels import to_model, to_uint8
from diffusion_lab.report.page import Section, write_report
from diffusion_lab.report.trajectory import TrajectoryRecorder
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import Sampler, State
from diffusion_lab.task.base import Task
from diffusion_lab.task.restore_report import KINDS, histogram, sections, tables
from diffusion_lab.task.results import Row, average, write_results
from diffusion_lab.task.run_sections import run_sections
from diffusion_lab.task.user_images import model_pairs

log = logging.getLogger(__name__)

SHOWN = 8  # images of the grid
SHOWN_SAMPLES = 4  # samples of each of them
STEIN = 0.1  # noise level of the Stein discrepancy, over that of y
LEVEL = 0.9  # of the central intervals whose coverage is in the table
PROJECTED = 64  # patches and random directions of an image that are ranked
FRECHET_LEAST = 16  # images from which the Fréchet distance says anything
ESTIMATES = {
    "noisy": "the observation y itself, unclipped",
    "sample": "one posterior sample (averaged over the samples of an image)",
    "mean": "the mean of the posterior samples",
    "mmse": "E[x_0 | y] by one call of the network",
    "posterior": "all samples of an image together, as a distribution",
}  # of the table, and what they are
METRICS = ("psnr", "ssim", "lpips", "crps", "energy_score", "ksd")


class Restore(Task):
    """Restores test images from observations, and compares the result with the truth.

    Arguments:
        operator: What is seen of an image, A.
        noise: The noise of y.
        guidance: The posterior method.
        sampler: Solves the reverse process.
        level: The noise level of a noisy image, as stated; None for other operators.
        data: The data module whose test split is restored; None with `truth` or `observation`.
        truth: One's own image, of shape (1, 3, H, W), in place of the test images.
        observation: One's own observation, used as it is, and not graded; of shape (1, *').
        model_pairs: Whether truth and observation are drawn from the prior's own reverse chain.
        num_images: How many images.
        num_samples: M, posterior samples of each; one suffices a method that has no chance in it.
        settings: The evaluation's configuration, for the report.
        shape: The shape (3, H, W) of an image.
        task: See `Task`.

    Raises:
        ConfigError: If there are not so many test images, they are too small, or the method is
            not defined for the operator and noise.
    """

    def __init__(
        self,
        *,
        operator: Operator,
        noise: Gaussian | Poisson,
        guidance: Guidance,
        sampler: Sampler,
        num_images: int,
        num_samples: int,
        settings: str,
        shape: tuple[int, ...],
        level: NoiseLevel | None = None,
        data: ImageDataModule | None = None,
        truth: Tensor | None = None,
        observation: Tensor | None = None,
        model_pairs: bool = False,
        **task: Any,
    ) -> None:
        super().__init__(**task)
        self.shape = shape
        if min(shape[1:]) < WINDOW:
            raise ConfigError(
                f"data.size={shape[-1]} of the run is smaller than the window of SSIM; "
                f"restoration is graded on images of at least {WINDOW} pixels"
            )
        self.operator, self.noise = operator, noise
        self.guidance, self.sampler, self.level = guidance, sampler, level
        self.truth, self.observed, self.model_pairs = truth, observation, model_pairs
        single = truth is not None or observation is not None
        self.num_images = 1 if single else num_images
        self.images = data.test_images(self.num_images) if data is not None else None
        self.num_samples, self.settings = num_samples, settings
        self.lpips = find_lpips() if min(shape[1:]) >= LEAST else None
        if not guidance.stochastic and num_samples > 1:
            log.info("guidance %s gives one image: num_samples=1", type(guidance).__name__)
            self.num_samples = 1
        self._check()

    def _check(self) -> None:
        """Asks the method about the operator and the noise, before anything is computed."""
        x_0 = torch.zeros(1, *self.shape)
        try:
            y = self.operator(x_0)
            if self.observed is not None and self.observed.shape != y.shape:
                raise ValueError(
                    f"observation is of shape {tuple(self.observed.shape[1:])}, the operator "
                    f"makes {tuple(y.shape[1:])}"
                )
            self.guidance.check(Observation(y, self.noise.std(y), self.operator))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def count(self) -> int:
        return self.num_images

    @property
    def group(self) -> int:
        return max(1, self.batch_size // self.num_samples)

    def _pictured(self, index: Tensor) -> tuple[Tensor | None, Tensor]:
        """The truths, if they are known, and the observations, of a group of images."""
        if self.observed is not None:
            return None, self.observed.to(self.device)
        if self.model_pairs:
            t, seed = self.level.t, self.seed
            x_t, x_0 = model_pairs(self.denoiser, self.shape, t, seed, index, clip=True)
            alpha_t, _ = self.denoiser.schedule(torch.tensor(t, dtype=torch.float64))
            return x_0, x_t / alpha_t.to(x_t)
        if self.truth is not None:
            x_0 = self.truth.to(self.device)
        else:
            x_0 = to_model(torch.from_numpy(self.images[index.cpu().numpy()]).to(self.device))
        generator = KeyedGenerator(make_key(self.seed, "observation", index))
        return x_0, self.noise.draw(self.operator(x_0), generator)

    def _sample(
        self, y: Tensor, index: Tensor, callback: Callable[[State], None] | None
    ) -> Tensor:
        """M samples for each y, of shape (G, M, C, H, W), no more than `batch_size` at once.

        The rows of an image on which the method diverged are NaN; the others are as if it had
        not been there.
        """
        number = torch.arange(self.num_samples, device=index.device).repeat(len(index))
        image = index.repeat_interleave(self.num_samples)
        keys = make_key(self.seed, "posterior", image, number)
        repeated = y.repeat_interleave(self.num_samples, 0)
        # Samples that share particles stay together.
        size = len(keys) if self.guidance.shares else self.batch_size
        samples = []
        for k, (y_part, key) in enumerate(
            zip(repeated.split(size), keys.split(size), strict=True)
        ):
            watch = callback if k == 0 else None
            samples.append(self._rows(y_part, key, watch))
        return torch.cat(samples).unflatten(0, (len(y), self.num_samples))

    def _rows(self, y: Tensor, key: Tensor, callback: Callable[[State], None] | None) -> Tensor:
        group = self.num_samples if self.guidance.shares else 1
        observation = Observation(y, self.noise.std(y), self.operator, group)
        try:
            return self.guidance(
                self.denoiser, self.sampler, observation, generator=KeyedGenerator(key),
                callback=callback,
            )  # fmt: skip
        except SamplingError as error:
            if len(y) == group:
                log.warning("an image is left out: %s", error)
                return y.new_full((len(y), *self.shape), float("nan"))
            parts = zip(y.split(group), key.split(group), strict=True)
            return torch.cat([self._rows(*part, None) for part in parts])

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        x_0, y = self._pictured(index)
        recorder = TrajectoryRecorder(self.denoiser.schedule) if int(index[0]) == 0 else None
        samples = self._sample(y, index, recorder)
        finite = samples.flatten(1).isfinite().all(1)
        samples = torch.where(finite[:, None, None, None, None], samples, 0.0)
        estimates = {"mean": samples.mean(1)}
        identity = isinstance(self.operator, Identity)
        if identity:
            observation = Observation(y, self.noise.std(y), self.operator)
            estimates["mmse"] = MMSE()(self.denoiser, self.sampler, observation)
        graded = (
            [{} for _ in index] if x_0 is None else self._grade(x_0, y, samples, estimates, index)
        )
        results = []
        for k, number in enumerate(index.tolist()):
            result: dict[str, Any] = {"finite": bool(finite[k]), **graded[k]}
            if number < SHOWN and finite[k]:
                columns = {} if x_0 is None else {"clean": x_0[k]}
                columns["noisy" if identity else "observed"] = self.operator.to_image(
                    y[k : k + 1]
                )[0]
                columns |= {"E[x_0 | y]": estimates["mmse"][k]} if identity else {}
                columns[f"mean of {self.num_samples}"] = estimates["mean"][k]
                count = min(SHOWN_SAMPLES, self.num_samples)
                columns |= {f"sample {m + 1}": samples[k, m] for m in range(count)}
                result["shown"] = {name: image.float().cpu() for name, image in columns.items()}
                result["std"] = samples[k].std(0, correction=int(self.num_samples > 1)).cpu()
            result["sample"] = to_uint8(samples[k, 0]).cpu()
            if number == 0 and recorder:
                result["path"] = recorder.result()
            results.append(result)
        return results

    def _grade(
        self,
        x_0: Tensor,
        y: Tensor,
        samples: Tensor,
        estimates: dict[str, Tensor],
        index: Tensor,
    ) -> list[dict[str, Any]]:
        """What is compared with the truth, for each image."""
        scores: dict[tuple[str, str], Tensor] = {}
        metrics = {"psnr": psnr, "ssim": ssim}
        if self.lpips is not None:
            metrics["lpips"] = self.lpips.to(x_0.device)
        for metric, function in metrics.items():
            if y.shape == x_0.shape:
                scores["noisy", metric] = function(y, x_0)
            each = [function(sample, x_0) for sample in samples.unbind(1)]
            scores["sample", metric] = torch.stack(each).mean(0)
            for name, estimate in estimates.items():
                scores[name, metric] = function(estimate, x_0)
        results: list[dict[str, Any]] = [{} for _ in x_0]
        if self.num_samples > 1:
            scores["posterior", "crps"] = crps(samples, x_0)
            scores["posterior", "energy_score"] = energy_score(samples, x_0)
            scores["posterior", "ksd"] = self._stein(y, samples, index)
            spread, error = spread_skill(samples, x_0)
            streams = KeyedGenerator(make_key(self.seed, "ties", index))
            place = ranks(samples, x_0, streams)
            covered = coverage(place, self.num_samples, LEVEL)
            counted = {"pixels": place.flatten(1)}
            for kind in ("patches", "random"):
                sides = (
                    projections(x, kind, PROJECTED, self.seed, patch=self.shape[-1] // 4,
                                batch_dims=n) for n, x in ((2, samples), (1, x_0))
                )  # fmt: skip
                counted[kind] = ranks(*sides, streams)
            balls = tarp_ranks(samples, x_0, self.seed, index=index, box=(-1.0, 1.0))
            for k, result in enumerate(results):
                result["ranks"] = {
                    kind: rank_histogram(found[k], self.num_samples).tolist()
                    for kind, found in counted.items()
                }
                result |= {
                    "coverage": float(covered[k]), "spread": float(spread[k]),
                    "error": float(error[k]), "tarp": int(balls[k]),
                }  # fmt: skip
        for k, result in enumerate(results):
            result["scores"] = {key: float(v[k]) for key, v in scores.items()}
            result["clean"] = to_uint8(x_0[k]).cpu()
        return results

    def _stein(self, y: Tensor, samples: Tensor, index: Tensor) -> Tensor:
        """How far samples are from the prior's own posterior, without the truth, (G,)."""
        number = torch.arange(self.num_samples, device=index.device)
        keys = make_key(self.seed, "stein", index[:, None], number).flatten()
        std = self.noise.std(y)
        rows = y.repeat_interleave(self.num_samples, 0)
        if isinstance(std, Tensor):
            std = std.repeat_interleave(self.num_samples, 0)
        observation = Observation(rows, std, self.operator, group=self.num_samples)
        schedule = self.denoiser.schedule
        # Far below the noise of y, where the score of y given x_t is all but exact.
        least = float(schedule.ratio(schedule.t_min))
        level = max(STEIN * float(torch.as_tensor(std).mean()), least)
        try:
            return stein_discrepancy(
                self.denoiser, samples.flatten(0, 1), schedule.t_from_ratio(level), observation,
                generator=KeyedGenerator(keys), batch_size=self.batch_size,
            )  # fmt: skip
        except ValueError:  # y without noise, or samples that are all the same: there is none
            return samples.new_full((len(samples),), float("nan"))

    def finish(self, results: list[dict[str, Any]]) -> None:
        good = [result for result in results if result["finite"]]
        rows = self._table(results, good)
        write_results(self.directory, rows)
        name, operator = type(self.guidance).__name__, type(self.operator).__name__
        noise = str(self.level or self.noise)
        identity = isinstance(self.operator, Identity)
        task = "Denoising" if identity else operator
        seen = "with" if identity else f"seen by {operator} with"
        truth = "drawn from the prior's own chain, " if self.model_pairs else ""
        report = write_report(
            self.directory / "report.html",
            f"{task} by posterior sampling, {name}",
            f"{len(results)} image(s), {truth}{seen} noise {noise} (sigma_y is "
            f"the noise added on the scale of [-1, 1]); {self.num_samples} posterior sample(s) of "
            f"each by {name} with {type(self.sampler).__name__} in {self.sampler.steps} steps.\n\n"
            "For an exact posterior sampler one sample is 3.01 dB below E[x_0 | y] and the mean "
            "of M samples 10 log10(1 + 1/M) dB; a network's own error lowers the first figure.",
            [
                *tables(rows, ESTIMATES, self._ideals()),
                *(self._sections(good) if good else []),
                *run_sections(
                    self.run,
                    {
                        "Operator": operator,
                        "Noise": noise,
                        "Method": name,
                        "Sampler": f"{type(self.sampler).__name__}, {self.sampler.steps} steps",
                        "Seed": str(self.seed),
                    },
                    self.settings,
                ),
            ],
        )
        print(f"\nnoise: {noise}\n")
        print(f"{'estimate':10}{'metric':14}{'mean':>9}{'stderr':>9}{'n':>6}")
        for estimate, metric, mean, error, n in rows:
            print(f"{estimate:10}{metric:14}{mean:9.3f}{error:9.3f}{n:6d}")
        print(f"\nreport: {report}")

    def _sections(self, good: list[dict[str, Any]]) -> list[Section]:
        return sections(
            good,
            self.directory / "samples",
            schedule=self.denoiser.schedule,
            seed=self.seed,
            identity=isinstance(self.operator, Identity),
            level=self.level,
        )

    def _ideals(self) -> str:
        """What an exact posterior sampler would have in the table."""
        if self.num_samples < 2:
            return ""
        return (
            "coverage_90 is the share of pixels in the central interval, ideally "
            f"{nominal(self.num_samples, LEVEL):.3f} for {self.num_samples} samples; spread_skill "
            "is ideally 1."
        )

    def _table(self, results: list[dict[str, Any]], good: list[dict[str, Any]]) -> list[Row]:
        graded = [result for result in good if "scores" in result]
        # A method that diverges says so in the first row; its other figures are of the rest.
        missing = float(len(results) - len(good))
        rows: list[Row] = [("sample", "nonfinite", missing, float("nan"), len(results))]
        if not graded:
            return rows
        order = list(ESTIMATES)
        keys = sorted(
            graded[0]["scores"], key=lambda key: (METRICS.index(key[1]), order.index(key[0]))
        )
        for estimate, metric in keys:
            values = [result["scores"][estimate, metric] for result in graded]
            rows.append(average(estimate, metric, values))
        if "ranks" in graded[0]:
            rows.append(average("posterior", "coverage_90", [r["coverage"] for r in graded]))
            spread, error = (torch.tensor([r[k] for r in graded]) for k in ("spread", "error"))
            ratio = float(spread_skill_ratio(spread, error, self.num_samples))
            rows.append(("posterior", "spread_skill", ratio, float("nan"), len(graded)))
            for kind in KINDS:
                chi2 = float(rank_chi2(histogram(graded, kind)))
                rows.append(("posterior", f"rank_chi2_{kind}", chi2, float("nan"), len(graded)))
        if len(graded) >= FRECHET_LEAST and (distance := _frechet(graded)) is not None:
            rows.append(("sample", f"frechet_{len(graded)}", distance, float("nan"), len(graded)))
        return rows


def _frechet(results: list[dict[str, Any]]) -> float | None:
    """The Fréchet distance of the first samples from the clean images; None without an extractor.

    By EfficientNet-Lite0's features: comparable among sets of the same images only.
    """
    try:
        network = EfficientNetLite0()
    except ConfigError:
        return None
    sets = (
        torch.stack([result[key] for result in results]).permute(0, 2, 3, 1)
        for key in ("sample", "clean")
    )
    return frechet_distance(*(Moments.of(extract(network, images)) for images in sets))
