"""Scores of posterior samples against the clean image, for each image."""

__all__ = ["Scorer"]

from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance import Observation
from diffusion_lab.metric import (
    coverage,
    load_metrics,
    projections,
    rank_histogram,
    ranks,
    spread_skill,
    stein_discrepancy,
    tarp_ranks,
)
from diffusion_lab.operator import Operator
from diffusion_lab.operator.noise_model import Noise
from diffusion_lab.pixels import to_uint8
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.task.restore_table import COVERAGE_LEVEL

STEIN = 0.1  # noise level of the Stein discrepancy, over that of y
PROJECTED = 64  # patches and random directions of an image that are ranked


class Scorer:
    """Scores of samples, estimates and posteriors.

    Arguments:
        denoiser: The prior.
        operator: The operator A.
        noise: The noise model of y.
        num_samples: Number M of samples of each image.
        seed: Seed of random projections, tied ranks and the noise of the Stein discrepancy.
        size: The shorter side of the images, in pixels; some metrics need larger images.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        operator: Operator,
        noise: Noise,
        num_samples: int,
        seed: int,
        size: int,
    ) -> None:
        self.denoiser, self.operator, self.noise = denoiser, operator, noise
        self.num_samples, self.seed = num_samples, seed
        self.image_metrics = load_metrics("image", size)
        self.sample_metrics = load_metrics("samples", size)

    def __call__(
        self,
        x_0: Tensor,
        y: Tensor,
        samples: Tensor,
        estimates: dict[str, Tensor],
        index: Tensor,
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """Returns the scores of each image, as numbers and plain containers of them.

        Arguments:
            x_0: Clean images, of shape (G, C, H, W).
            y: Observations, of shape (G, *).
            samples: Posterior samples, of shape (G, M, C, H, W).
            estimates: Point estimates of x_0 by name, of shape (G, C, H, W).
            index: Numbers of the images, of shape (G,).
            batch_size: Number of images that go through the network at once.
        """
        scores = self._pointwise(x_0, y, samples, estimates)
        results: list[dict[str, Any]] = [{} for _ in x_0]
        if self.num_samples > 1:
            for metric, function in self.sample_metrics.items():
                scores["posterior", metric] = function(samples, x_0)
            scores["posterior", "ksd"] = self._stein(y, samples, index, batch_size)
            for result, found in zip(results, self._ranks(x_0, samples, index), strict=True):
                result |= found
        for k, result in enumerate(results):
            result["scores"] = {key: float(v[k]) for key, v in scores.items()}
            result["clean"] = to_uint8(x_0[k]).cpu()
        return results

    def _pointwise(
        self, x_0: Tensor, y: Tensor, samples: Tensor, estimates: dict[str, Tensor]
    ) -> dict[tuple[str, str], Tensor]:
        """Metrics between two images, by estimate and metric."""
        scores: dict[tuple[str, str], Tensor] = {}
        for metric, function in self.image_metrics.items():
            if isinstance(function, nn.Module):
                function.to(x_0.device)
            if y.shape == x_0.shape:
                scores["noisy", metric] = function(y, x_0)
            each = [function(sample, x_0) for sample in samples.unbind(1)]
            scores["sample", metric] = torch.stack(each).mean(0)
            for name, estimate in estimates.items():
                scores[name, metric] = function(estimate, x_0)
        return scores

    def _ranks(self, x_0: Tensor, samples: Tensor, index: Tensor) -> list[dict[str, Any]]:
        """Calibration: ranks of the truth among the samples, coverage, spread and error."""
        spread, error = spread_skill(samples, x_0)
        generator = KeyedGenerator(make_key(self.seed, "ties", index))
        pixels = ranks(samples, x_0, generator)
        covered = coverage(pixels, self.num_samples, COVERAGE_LEVEL)
        by_kind = {"pixels": pixels.flatten(1)}
        for kind in ("patches", "random"):
            of_samples, of_truth = (
                projections(x, kind, PROJECTED, self.seed, patch=x_0.shape[-1] // 4, batch_dims=n)
                for n, x in ((2, samples), (1, x_0))
            )
            by_kind[kind] = ranks(of_samples, of_truth, generator)
        balls = tarp_ranks(samples, x_0, self.seed, index=index, box=(-1.0, 1.0))
        return [
            {
                "ranks": {
                    kind: rank_histogram(found[k], self.num_samples).tolist()
                    for kind, found in by_kind.items()
                },
                "coverage": float(covered[k]),
                "spread": float(spread[k]),
                "error": float(error[k]),
                "tarp": int(balls[k]),
            }
            for k in range(len(x_0))
        ]

    def _stein(self, y: Tensor, samples: Tensor, index: Tensor, batch_size: int) -> Tensor:
        """The Stein discrepancy of samples and the prior's own posterior, of shape (G,)."""
        number = torch.arange(self.num_samples, device=index.device)
        keys = make_key(self.seed, "stein", index[:, None], number).flatten()
        std = self.noise.std(y)
        rows = y.repeat_interleave(self.num_samples, 0)
        if isinstance(std, Tensor):
            std = std.repeat_interleave(self.num_samples, 0)
        observation = Observation(rows, std, self.operator, group=self.num_samples)
        schedule = self.denoiser.schedule
        # Far below the noise of y, where the score of y given x_t is nearly exact.
        lowest = float(schedule.ratio(schedule.t_min))
        level = max(STEIN * float(torch.as_tensor(std).mean()), lowest)
        try:
            return stein_discrepancy(
                self.denoiser, samples.flatten(0, 1), schedule.t_from_ratio(level), observation,
                generator=KeyedGenerator(keys), batch_size=batch_size,
            )  # fmt: skip
        except ValueError:  # undefined without noise, and for identical samples
            return samples.new_full((len(samples),), float("nan"))
