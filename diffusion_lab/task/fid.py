r"""Quality of the images of a prior: FID, KID, precision and recall against a split.

Blocks of n images are drawn; block s has the images s n, ..., (s + 1) n - 1 of `task=generate`.
Each block is compared with the whole split. The results are given for each block, with the mean,
the standard deviation and the smallest distance over the blocks. Only features are stored.
"""

__all__ = ["FID"]

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion_lab.constraints import PositiveInt, Range, checked
from diffusion_lab.errors import ConfigError
from diffusion_lab.metric import (
    Moments,
    extract,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusion_lab.metric.feature_statistics import reference_features
from diffusion_lab.metric.features import metric_name
from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.image_grid import image_grid, save_png
from diffusion_lab.report.page import Picture, Table, write_report
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.task.base import Task, TaskArguments
from diffusion_lab.task.results import Row, write_results
from diffusion_lab.task.run_sections import run_sections

SHOWN = 64  # images of the grid
MIN_IMAGES = 8  # smallest set: the metrics need three neighbours and a covariance
DISTANCES = ("frechet", "kernel")  # metrics of which smaller is better
NAN = float("nan")

log = logging.getLogger(__name__)


class FID(Task):
    """Compares images of the prior with those of a split.

    Arguments:
        extractor: Returns the feature extractor.
        num_samples: Number n of images of a block.
        num_seeds: Number of blocks.
        reference: The split.
        common: See `Task`.

    Raises:
        ConfigError: If the split has too few images, or the weights of the extractor are missing.
    """

    @checked
    def __init__(
        self,
        *,
        extractor: Callable[[], nn.Module],
        num_samples: Annotated[int, Range(MIN_IMAGES)],
        num_seeds: PositiveInt,
        reference: Literal["train", "val", "test"],
        **common: Unpack[TaskArguments],
    ) -> None:
        super().__init__(**common)
        self.data, self.reference = common["open_data"](), reference
        self.num_samples, self.num_seeds = num_samples, num_seeds
        if (count := len(self.data.images[reference])) < MIN_IMAGES:
            raise ConfigError(
                f"reference={reference} has {count} images; at least {MIN_IMAGES} are needed. "
                "Choose another split"
            )
        self.extractor: Any = extractor()  # a module with `name` and `dim`
        self._reference: tuple[Moments, Tensor] | None = None

    @property
    def count(self) -> int:
        return self.num_samples * self.num_seeds

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Returns the numbers of this rank's images without results, in groups.

        A group has consecutive images and does not depend on the number of devices, so that the
        features are equal bit for bit.
        """
        done = {result["index"] for result in self._saved_results()}
        if done:
            log.info("%d of %d images are done already", len(done), self.count)
        groups = torch.split(torch.arange(self.count), self.group_size)
        mine = groups[self.trainer.global_rank :: self.trainer.world_size]
        missing = [group[[k not in done for k in group.tolist()]] for group in mine]
        return self._loader([group for group in missing if len(group)])

    def on_test_start(self) -> None:
        """Computes the features of the split first, so that errors in it occur early."""
        if self.trainer.is_global_zero:
            self._reference_features()

    def _reference_features(self) -> tuple[Moments, Tensor]:
        """The moments and features of the split."""
        if self._reference is None:
            content = self.data.state_dict()["splits"][self.reference]["content"]
            self._reference = reference_features(
                self.data.images[self.reference], content, self.extractor,
                self.data.cache_dir / "statistics", device=self.device,
                progress=partial(
                    tqdm, desc=f"{self.extractor.name} of {self.reference}", leave=False
                ),
            )  # fmt: skip
        return self._reference

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        generator = KeyedGenerator(make_key(self.seed, "generate", index))
        start = self.denoiser.schedule.prior((len(index), *self.shape), generator)
        images = to_uint8(self.sampler(self.denoiser, start, generator=generator))
        features = extract(self.extractor, images.permute(0, 2, 3, 1))
        return [
            {"features": features[k], **({"image": images[k].cpu()} if number < SHOWN else {})}
            for k, number in enumerate(index.tolist())
        ]

    def _metrics(self, drawn: Tensor, moments: Moments, real: Tensor) -> dict[str, Any]:
        """Value and standard error of each metric."""
        precision, recall = precision_recall(drawn, real)
        return {
            "frechet": (frechet_distance(Moments.of(drawn), moments), NAN),
            "kernel": kernel_distance(drawn, real),
            "precision": (precision, NAN),
            "recall": (recall, NAN),
        }

    def _rows(self, blocks: Sequence[Tensor]) -> list[Row]:
        moments, real = self._reference_features()
        by_block = [self._metrics(block, moments, real) for block in blocks]
        rows: list[Row] = []
        for metric in by_block[0]:
            name = metric_name(metric, self.extractor.name, self.num_samples)
            values = [each[metric][0] for each in by_block]
            std = stdev(values) if len(values) > 1 else NAN
            rows.append(
                Row("mean", name, fmean(values), std / math.sqrt(len(values)), len(values))
            )
            rows.append(Row("std", name, std, NAN, len(values)))
            if metric in DISTANCES:
                rows.append(Row("min", name, min(values), NAN, len(values)))
            for s, each in enumerate(by_block):
                value, stderr = each[metric]
                rows.append(Row(f"block {s}", name, value, stderr, self.num_samples))
        # The metrics of real images, as the scale of the others.
        few, others = real[::2][: self.num_samples], real[1::2]
        for metric, (value, error) in self._metrics(few, Moments.of(others), others).items():
            name = metric_name(metric, self.extractor.name, len(few))
            rows.append(Row(self.reference, name, value, error, len(few)))
        return rows

    def finish(self, results: list[dict[str, Any]]) -> None:
        features = torch.stack([result["features"] for result in results])
        blocks = torch.split(features, self.num_samples)
        rows = self._rows(blocks)
        write_results(self.directory, rows)
        shown = torch.stack([result["image"] for result in results[:SHOWN]])
        path = self.directory / "samples" / "grid.png"
        path.parent.mkdir(exist_ok=True)
        columns = math.ceil(math.sqrt(len(shown)))
        save_png(image_grid(shown.float() / 127.5 - 1, columns), path)
        sampler, real = type(self.sampler).__name__, len(self._reference_features()[1])
        split = f"{self._reference_features()[0].n} images of the {self.reference} split"
        report = write_report(
            self.directory / "report.html",
            "Quality of the prior's images",
            f"{self.num_seeds} block(s) of {self.num_samples} images each, drawn by {sampler} in "
            f"{self.sampler.steps} steps, against {split}, by the features of "
            f"{self.extractor.name}.\n\nDistances depend on the features and on the number of "
            "images; only values with the same metric name are comparable.",
            [
                self._summary(rows),
                self._all(rows, real),
                Picture("Samples", f"The first {len(shown)} of {len(results)} images.", path),
                *run_sections(
                    self.run,
                    {
                        "Sampler": f"{sampler}, {self.sampler.steps} steps",
                        "Extractor": f"{self.extractor.name}, {self.extractor.dim} features",
                        "Reference": split,
                        "Seed": str(self.seed),
                    },
                    self.settings,
                ),
            ],
        )
        print(f"\n{'estimate':10}{'metric':32}{'value':>10}{'stderr':>9}{'n':>7}")
        for estimate, metric, value, error, n in rows:
            print(f"{estimate:10}{metric:32}{value:10.4g}{error:9.2g}{n:7d}")
        print(f"\nreport: {report}")

    def _summary(self, rows: list[Row]) -> Table:
        """Mean, standard deviation and smallest value over the blocks."""
        by = {(estimate, metric): value for estimate, metric, value, _, _ in rows}
        names = [metric for estimate, metric, *_ in rows if estimate == "mean"]
        return Table(
            "Results",
            f"Mean ± standard deviation and smallest distance over {self.num_seeds} block(s).",
            ["metric", "mean ± standard deviation", "min"],
            [
                [
                    n,
                    _with_std(by["mean", n], by["std", n]),
                    f"{by['min', n]:.4g}" if ("min", n) in by else "",
                ]
                for n in names
            ],
        )

    def _all(self, rows: list[Row], real: int) -> Table:
        few = min(self.num_samples, -(-real // 2))
        return Table(
            "Each block",
            f"The rows of {self.reference} compare {few} real images with {real // 2} other ones: "
            "the best values to be expected. Kernel distance (KID): the unbiased MMD², which can "
            "be negative, and its standard error.",
            ["images", "metric", "value", "n"],
            [
                [estimate, metric, _with_std(value, error), n]
                for estimate, metric, value, error, n in rows
                if estimate not in ("mean", "std", "min")
            ],
        )


def _with_std(value: float, std: float) -> str:
    return f"{value:.4g}" if std != std else f"{value:.4g} ± {std:.2g}"
