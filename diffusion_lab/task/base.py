r"""What all evaluations share: numbered images, shared out over devices, and one place at the end.

Every random draw for image number k is a function of (seed, k, sample number). Ranks take the
numbers r, r + W, ..., never a number twice, and the results are put in order at the end: they are
the same for any batch size and any number of devices.
"""

__all__ = ["Row", "Task", "average", "write_results"]

import csv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning import LightningModule
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lab.errors import RunError
from diffusion_lab.runs import Run

Row = tuple[str, str, float, float, int]  # estimate, metric, mean, standard error, n


def average(estimate: str, metric: str, values: Sequence[float]) -> Row:
    """Returns the mean over the images, and its standard error (NaN of a single one)."""
    n = len(values)
    error = stdev(values) / n**0.5 if n > 1 else float("nan")
    return estimate, metric, fmean(values), error, n


def write_results(directory: Path, rows: Sequence[Row]) -> None:
    """Writes results.csv."""
    with open(directory / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["estimate", "metric", "mean", "stderr", "n"])
        writer.writerows(rows)


class Task(LightningModule, ABC):
    """One evaluation of a run, driven by `Trainer.test`.

    Arguments:
        run: The run.
        directory: Where results go.
        seed: Seed of every draw.
        batch_size: Images that go through the network at once.
    """

    def __init__(self, run: Run, directory: Path, seed: int, batch_size: int) -> None:
        super().__init__()
        self.run = run
        self.denoiser = run.denoiser
        self.directory = directory
        self.seed, self.batch_size = seed, batch_size
        self.results: list[dict[str, Any]] = []

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of images."""

    @property
    def group(self) -> int:
        """How many images are computed in one step."""
        return self.batch_size

    @abstractmethod
    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        """Returns the result of each image of a group, on the CPU; the key `index` is added.

        Arguments:
            index: The images' numbers, int64, of shape (G,), on the device.
        """

    @abstractmethod
    def finish(self, results: list[dict[str, Any]]) -> None:
        """Writes files from the results of all images in order; on one rank only."""

    def test_dataloader(self) -> DataLoader:
        """Returns this rank's image numbers, in groups."""
        mine = range(self.trainer.global_rank, self.count, self.trainer.world_size)
        return DataLoader(mine, batch_size=self.group)

    def test_step(self, index: Tensor, batch_idx: int) -> None:
        """Computes one group of images."""
        for k, result in zip(index.tolist(), self.compute(index), strict=True):
            self.results.append({"index": k, **result})

    def on_test_epoch_end(self) -> None:
        """Gathers the results of all ranks and finishes."""
        results = self.results
        if _distributed_is_initialized():
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.results)
            results = list(chain.from_iterable(gathered))
        if not self.trainer.is_global_zero:
            return
        try:
            self.finish(sorted(results, key=lambda result: result["index"]))
        except OSError as error:
            raise RunError(
                f"cannot write results to {self.directory}: {error}; free space there, or choose "
                "another hydra.run.dir"
            ) from error
