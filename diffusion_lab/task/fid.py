r"""How good the images of a prior are: FID, KID, precision and recall against a split.

Several times n images are drawn, block s being the images s n, ..., (s + 1) n - 1 of
`task=generate`; each block is compared with the whole split, and the figures are given for each
block, with mean, standard deviation and least distance over the blocks. Only features are kept.
"""

__all__ = ["FID"]

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.errors import ConfigError
from diffusion_lab.metric import (
    Moments,
    extract,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusion_lab.metric.feature_statistics import reference_features
from diffusion_lab.metric.features import title
from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.image_grid import image_grid, save_png
from diffusion_lab.report.page import Picture, Table, write_report
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import Sampler
from diffusion_lab.task.base import Task
from diffusion_lab.task.results import Row, write_results
from diffusion_lab.task.run_sections import run_sections

SHOWN = 64  # images of the picture
LEAST = 8  # images of a set: of so few there are three neighbours and a covariance
DISTANCES = ("frechet", "kernel")  # whose least value is the best
NAN = float("nan")

log = logging.getLogger(__name__)


class FID(Task):
    """Compares drawn images with those of a split.

    Arguments:
        data: The data module.
        sampler: Solves the reverse process.
        extractor: Makes the extractor.
        num_samples: The number n of images of a block.
        num_seeds: The number of blocks.
        reference: The split: train, val or test.
        settings: The evaluation's configuration, for the report.
        task: See `Task`.

    Raises:
        ConfigError: If there are too few images, or the extractor's weights are missing.
    """

    def __init__(
        self,
        *,
        data: ImageDataModule,
        sampler: Sampler,
        extractor: Callable[[], nn.Module],
        num_samples: int,
        num_seeds: int,
        reference: str,
        settings: str,
        **task: Any,
    ) -> None:
        super().__init__(**task)
        self.data, self.reference = data, reference
        self.num_samples, self.num_seeds = num_samples, num_seeds
        for key, count, way_out in (
            ("num_samples", num_samples, "raise it"),
            (f"reference={reference}: its number of images", len(data.images[reference]),
             "choose another split"),
        ):  # fmt: skip
            if count < LEAST:
                raise ConfigError(f"{key}={count} is not allowed; at least {LEAST}: {way_out}")
        self.sampler, self.settings = sampler, settings
        self.extractor = extractor()
        self.found: tuple[Moments, Tensor] | None = None  # of the split

    @property
    def count(self) -> int:
        return self.num_samples * self.num_seeds

    def test_dataloader(self) -> DataLoader:
        """Returns the numbers of this rank's images that are not done, in groups.

        The groups are whole stretches of images, the same ones on any number of devices, and so
        are the features, to the last bit.
        """
        done = {result["index"] for result in self._done()}
        if done:
            log.info("%d of %d images are done already", len(done), self.count)
        groups = torch.arange(self.count).split(self.group)
        mine = groups[self.trainer.global_rank :: self.trainer.world_size]
        missing = [group[[k not in done for k in group.tolist()]] for group in mine]
        return self._loader([group for group in missing if len(group)])

    def on_test_start(self) -> None:
        """Finds the split's features first: on the device, and before hours are spent."""
        if self.trainer.is_global_zero:
            self._found()

    def _found(self) -> tuple[Moments, Tensor]:
        """The moments and features of the split."""
        if self.found is None:
            content = self.data.state_dict()["splits"][self.reference]["content"]
            self.found = reference_features(
                self.data.images[self.reference], content, self.extractor,
                self.data.cache_dir / "statistics", device=self.device,
                progress=partial(
                    tqdm, desc=f"{self.extractor.name} of {self.reference}", leave=False
                ),
            )  # fmt: skip
        return self.found

    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        config = self.run.config
        size, channels = config["data"]["size"], config["network"]["image_channels"]
        generator = KeyedGenerator(make_key(self.seed, "generate", index))
        start = self.denoiser.schedule.prior((len(index), channels, size, size), generator)
        images = to_uint8(self.sampler(self.denoiser, start, generator=generator))
        features = extract(self.extractor, images.permute(0, 2, 3, 1))
        return [
            {"features": features[k], **({"image": images[k].cpu()} if number < SHOWN else {})}
            for k, number in enumerate(index.tolist())
        ]

    def _figures(self, drawn: Tensor, moments: Moments, real: Tensor) -> dict[str, Any]:
        """Value and standard error of each figure."""
        precision, recall = precision_recall(drawn, real)
        return {
            "frechet": (frechet_distance(Moments.of(drawn), moments), NAN),
            "kernel": kernel_distance(drawn, real),
            "precision": (precision, NAN),
            "recall": (recall, NAN),
        }

    def _rows(self, blocks: Sequence[Tensor]) -> list[Row]:
        moments, real = self._found()
        found = [self._figures(block, moments, real) for block in blocks]
        rows: list[Row] = []
        for figure in found[0]:
            name = title(figure, self.extractor.name, self.num_samples)
            values = [each[figure][0] for each in found]
            std = stdev(values) if len(values) > 1 else NAN
            rows.append(("mean", name, fmean(values), std / math.sqrt(len(values)), len(values)))
            rows.append(("std", name, std, NAN, len(values)))
            if figure in DISTANCES:
                rows.append(("min", name, min(values), NAN, len(values)))
            for s, each in enumerate(found):
                rows.append((f"block {s}", name, *each[figure], self.num_samples))
        # What real images have: the scale that the figures are to be read on.
        few, others = real[::2][: self.num_samples], real[1::2]
        for figure, (value, error) in self._figures(few, Moments.of(others), others).items():
            name = title(figure, self.extractor.name, len(few))
            rows.append((self.reference, name, value, error, len(few)))
        return rows

    def finish(self, results: list[dict[str, Any]]) -> None:
        blocks = torch.stack([result["features"] for result in results]).split(self.num_samples)
        rows = self._rows(blocks)
        write_results(self.directory, rows)
        shown = torch.stack([result["image"] for result in results[:SHOWN]])
        path = self.directory / "samples" / "grid.png"
        path.parent.mkdir(exist_ok=True)
        columns = math.ceil(math.sqrt(len(shown)))
        save_png(image_grid(shown.float() / 127.5 - 1, columns), path)
        sampler, real = type(self.sampler).__name__, len(self._found()[1])
        split = f"{self._found()[0].n} images of the {self.reference} split"
        report = write_report(
            self.directory / "report.html",
            "Quality of the prior's images",
            f"{self.num_seeds} block(s) of {self.num_samples} images each, drawn by {sampler} in "
            f"{self.sampler.steps} steps, against {split}, by the features of "
            f"{self.extractor.name}.\n\nDistances depend on the features and on the number of "
            "images, which their names carry: only those of one name can be compared.",
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
        """Mean, deviation and least value over the blocks."""
        by = {(estimate, metric): value for estimate, metric, value, _, _ in rows}
        names = [metric for estimate, metric, *_ in rows if estimate == "mean"]
        return Table(
            "Results",
            f"Mean ± standard deviation, and the least distance, over {self.num_seeds} block(s).",
            ["figure", "mean ± standard deviation", "min"],
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
            f"The rows of {self.reference} are of {few} real images against other {real // 2} of "
            "them: what drawn ones could at best have. Kernel distance (KID): MMD² and its "
            "standard error; without bias, it may lie below 0.",
            ["images", "figure", "value", "n"],
            [
                [estimate, metric, _with_std(value, error), n]
                for estimate, metric, value, error, n in rows
                if estimate not in ("mean", "std", "min")
            ],
        )


def _with_std(value: float, std: float) -> str:
    return f"{value:.4g}" if std != std else f"{value:.4g} ± {std:.2g}"
