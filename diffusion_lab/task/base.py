r"""What all evaluations share: numbered images, shared out over devices, and one place at the end.

Every random draw for image number k is a function of (seed, k, sample number). Ranks take the
numbers r, r + W, ..., never a number twice, and the results are put in order at the end: they are
the same for any batch size and any number of devices. Each group of results is a file as soon as
it is there; an evaluation that was interrupted goes on with the images that are missing.
"""

__all__ = ["Task"]

import io
import logging
import pickle
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import RunError
from diffusion_lab.logger.log import log_results
from diffusion_lab.runs import Run
from diffusion_lab.runs.layout import PARTIAL

log = logging.getLogger(__name__)

AUTO = {"cuda": 256}  # images at once with batch_size=auto, before it is known what fits
AUTO_ELSEWHERE = 64


class Task(LightningModule, ABC):
    """One evaluation of a run, driven by `Trainer.test`.

    Arguments:
        run: The run.
        directory: Where results go.
        seed: Seed of every draw.
        batch_size: Images that go through the network at once. "auto" begins with many, and takes
            half as many where the device's memory does not hold them.
    """

    def __init__(self, run: Run, directory: Path, seed: int, batch_size: int | str) -> None:
        super().__init__()
        self.run = run
        self.denoiser = run.denoiser
        self.directory = directory
        self.seed, self.auto = seed, batch_size == "auto"
        self.batch_size = AUTO_ELSEWHERE if isinstance(batch_size, str) else batch_size

    def setup(self, stage: str) -> None:
        """Chooses the first size of `auto`, once the device is known."""
        if self.auto:
            device = self.trainer.strategy.root_device.type
            self.batch_size = AUTO.get(device, AUTO_ELSEWHERE)

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

        Results are numbers, texts, tensors and plain containers of them.

        Arguments:
            index: The images' numbers, int64, of shape (G,), on the device.
        """

    @abstractmethod
    def finish(self, results: list[dict[str, Any]]) -> None:
        """Writes files from the results of all images in order; on one rank only."""

    def _done(self) -> list[dict[str, Any]]:
        """The results that are there, in order; the first of each image."""
        results: dict[int, dict[str, Any]] = {}
        for path in sorted((self.directory / PARTIAL).glob("*.pt")):
            try:
                part = torch.load(path, map_location="cpu", weights_only=True)
                for result in part:
                    results.setdefault(result["index"], result)
            except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, KeyError) as error:
                raise RunError(
                    f"{path} is damaged ({str(error).splitlines()[0]}); remove it, and its images "
                    "are computed again"
                ) from error
        return [results[k] for k in sorted(results) if k < self.count]

    def test_dataloader(self) -> DataLoader:
        """Returns the numbers of this rank's images that are not done, in groups."""
        done = {result["index"] for result in self._done()}
        if done:
            log.info("%d of %d images are done already", len(done), self.count)
        mine = list(range(self.trainer.global_rank, self.count, self.trainer.world_size))
        # The groups are those of an uninterrupted evaluation: so are the results, to the last bit.
        groups = [mine[k : k + self.group] for k in range(0, len(mine), self.group)]
        missing = [[k for k in group if k not in done] for group in groups]
        return self._loader([torch.tensor(group) for group in missing if group])

    def _loader(self, groups: list[Tensor]) -> DataLoader:
        """Of several ranks one may have nothing to do; Lightning wants a batch of each."""
        if not groups and self.trainer.world_size > 1:
            groups = [torch.empty(0, dtype=torch.int64)]
        return DataLoader(groups, batch_size=None)

    def test_step(self, index: Tensor, batch_idx: int) -> None:
        """Computes one group of images and keeps the results."""
        numbers = index.tolist()
        if not numbers:
            return
        results = [
            {"index": k, **result} for k, result in zip(numbers, self._fitting(index), strict=True)
        ]
        buffer = io.BytesIO()
        torch.save(results, buffer)
        name = f"{numbers[0]:08d}-{len(numbers)}.pt"
        try:
            write_atomic(self.directory / PARTIAL / name, buffer.getvalue())
        except OSError as error:
            raise RunError(
                f"cannot write results to {self.directory}: {error}; free space there and go on "
                f"with: python eval.py resume={self.directory}"
            ) from error

    def _fitting(self, index: Tensor) -> list[dict[str, Any]]:
        """The results of a group of images, in parts of it that the device's memory holds.

        Raises:
            RunError: If it does not hold a part, and none smaller is allowed.
        """
        results: list[dict[str, Any]] = []
        before = self.batch_size
        while len(results) < len(index):
            try:
                results += self.compute(index[len(results) :][: self.group])
                continue
            except torch.OutOfMemoryError as error:
                if not self.auto or self.batch_size == 1:
                    way_out = "take precision=bfloat16, fewer samples or another guidance="
                    if not self.auto:
                        way_out = f"set batch_size=auto or below {self.batch_size}"
                    raise RunError(
                        f"the device's memory does not hold batch_size={self.batch_size} "
                        f"({str(error).splitlines()[0]}); {way_out}"
                    ) from error
            # Not within `except`: until its end the error holds on to what was computed.
            self.batch_size //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.batch_size < before:
            log.info("batch_size=auto: the device's memory holds %d at once", self.batch_size)
        return results

    def conclude(self, trainer: Trainer) -> None:
        """Finishes from the results of all ranks, after `Trainer.test`.

        Not in a hook of it: there is none if all images were done before.

        Raises:
            RunError: If images are missing, or files cannot be written.
        """
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        results = self._done()
        if len(results) < self.count:
            raise RunError(
                f"{self.count - len(results)} of {self.count} images are missing in "
                f"{self.directory}; go on with: python eval.py resume={self.directory}"
            )
        try:
            self.finish(results)
        except OSError as error:
            raise RunError(
                f"cannot write results to {self.directory}: {error}; free space there and go on "
                f"with: python eval.py resume={self.directory}"
            ) from error
        log_results(trainer.loggers, self.directory)
        shutil.rmtree(self.directory / PARTIAL)
