r"""Base class of evaluations: numbered images, distributed over devices, resumable.

Every random draw for image k is a function of (seed, k, sample number). Rank r of W computes the
images r, r + W, ..., and the results are ordered by number at the end, so that they do not depend
on the batch size or the number of devices. The results of each group of images are written as
soon as they are computed; a resumed evaluation computes the missing images only.
"""

__all__ = ["Task", "TaskArguments"]

import io
import logging
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Required, TypedDict

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.constraints import NonNegativeInt, PositiveInt, checked
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.errors import RunError
from diffusion_lab.logger.log import log_results
from diffusion_lab.runs import Run
from diffusion_lab.runs.layout import PARTIAL_DIR
from diffusion_lab.runs.shell import shell_command
from diffusion_lab.sampler import Sampler

log = logging.getLogger(__name__)

AUTO = {"cuda": 256}  # first batch size of batch_size=auto, by device type
AUTO_ELSEWHERE = 64


class TaskArguments(TypedDict, total=False):
    """The arguments of `Task`, which every task accepts as keywords besides its own."""

    run: Required[Run]
    directory: Required[Path]
    seed: Required[int]
    batch_size: Required[int | Literal["auto"]]
    sampler: Required[Sampler]
    settings: Required[str]
    open_data: Required[Callable[[], ImageDataModule]]


class Task(LightningModule, ABC):
    """One evaluation of a run, driven by `Trainer.test`.

    A task has its own keyword arguments, which are the keys of its configuration, and passes the
    following ones on as `**common`. A task with `uses_operator` also takes `operator` and
    `guidance`.

    Arguments:
        run: The run that is evaluated.
        directory: Directory of the results.
        seed: Seed of every draw.
        batch_size: Number of images that go through the network at once. "auto" starts with a
            large number and halves it when the device runs out of memory.
        sampler: Sampler of the reverse process.
        settings: The configuration of the evaluation as YAML, for the report.
        open_data: Returns the data module after `setup("test")`. Called in the constructor, by
            tasks that read images only.

    Attributes:
        uses_operator: Whether the constructor takes `operator` and `guidance`.
    """

    uses_operator: ClassVar[bool] = False

    @checked
    def __init__(
        self,
        *,
        run: Run,
        directory: Path,
        seed: NonNegativeInt,
        batch_size: PositiveInt | Literal["auto"],
        sampler: Sampler,
        settings: str,
        open_data: Callable[[], ImageDataModule],
    ) -> None:
        super().__init__()
        self.run, self.denoiser, self.shape = run, run.denoiser, run.shape
        self.sampler, self.settings = sampler, settings
        self.directory = directory
        self.seed, self.auto = seed, batch_size == "auto"
        self.batch_size = AUTO_ELSEWHERE if isinstance(batch_size, str) else batch_size

    @classmethod
    def check_keys(cls, keys: Mapping[str, Any]) -> None:
        """Checks constraints between the task's own keys, before the run is loaded.

        Arguments:
            keys: The keys of the task in the configuration.

        Raises:
            ConfigError: If keys contradict each other.
        """

    def setup(self, stage: str) -> None:
        """Chooses the first batch size of "auto", which depends on the device."""
        if self.auto:
            device = self.trainer.strategy.root_device.type
            self.batch_size = AUTO.get(device, AUTO_ELSEWHERE)

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of images."""

    @property
    def group_size(self) -> int:
        """The number of images that are computed in one step."""
        return self.batch_size

    @abstractmethod
    def compute(self, index: Tensor) -> list[dict[str, Any]]:
        """Returns the result of each image of a group, on the CPU.

        Results are numbers, strings, tensors and plain containers of them; `test_step` adds the
        key `index`.

        Arguments:
            index: Numbers of the images, int64, of shape (G,), on the device.
        """

    @abstractmethod
    def finish(self, results: list[dict[str, Any]]) -> None:
        """Writes the files of the evaluation; called on rank 0 only.

        Arguments:
            results: The results of all images, in order.
        """

    def _saved_results(self) -> list[dict[str, Any]]:
        """The results that are written already, in order; the first of each image."""
        results: dict[int, dict[str, Any]] = {}
        for path in sorted((self.directory / PARTIAL_DIR).glob("*.pt")):
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

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Returns the numbers of this rank's images without results, in groups."""
        done = {result["index"] for result in self._saved_results()}
        if done:
            log.info("%d of %d images are done already", len(done), self.count)
        mine = list(range(self.trainer.global_rank, self.count, self.trainer.world_size))
        # The groups of an uninterrupted evaluation, so that the results are equal bit for bit.
        groups = [mine[k : k + self.group_size] for k in range(0, len(mine), self.group_size)]
        missing = [[k for k in group if k not in done] for group in groups]
        return self._loader([torch.tensor(group) for group in missing if group])

    def _loader(self, groups: list[Tensor]) -> DataLoader[Tensor]:
        """The loader of groups; at least one batch per rank, which Lightning requires."""
        if not groups and self.trainer.world_size > 1:
            groups = [torch.empty(0, dtype=torch.int64)]
        return DataLoader(groups, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def test_step(self, index: Tensor, batch_idx: int) -> None:
        """Computes one group of images and keeps the results."""
        numbers = index.tolist()
        if not numbers:
            return
        results = [
            {"index": k, **result}
            for k, result in zip(numbers, self._compute_within_memory(index), strict=True)
        ]
        buffer = io.BytesIO()
        torch.save(results, buffer)
        name = f"{numbers[0]:08d}-{len(numbers)}.pt"
        try:
            write_atomic(self.directory / PARTIAL_DIR / name, buffer.getvalue())
        except OSError as error:
            raise RunError(
                f"cannot write results to {self.directory}: {error}; free space there and resume "
                f"with: {shell_command('eval', resume=self.directory)}"
            ) from error

    def _compute_within_memory(self, index: Tensor) -> list[dict[str, Any]]:
        """The results of a group, computed in parts that fit into the device's memory.

        Raises:
            RunError: If a part does not fit, and no smaller batch size is allowed.
        """
        results: list[dict[str, Any]] = []
        before = self.batch_size
        while len(results) < len(index):
            try:
                results += self.compute(index[len(results) :][: self.group_size])
                continue
            except torch.OutOfMemoryError as error:
                if not self.auto or self.batch_size == 1:
                    way_out = "use precision=bfloat16, fewer samples or another guidance="
                    if not self.auto:
                        way_out = f"set batch_size=auto or below {self.batch_size}"
                    raise RunError(
                        f"the device's memory does not hold batch_size={self.batch_size} "
                        f"({str(error).splitlines()[0]}); {way_out}"
                    ) from error
            # Outside of `except`, where the error keeps the tensors of the attempt alive.
            self.batch_size //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.batch_size < before:
            log.info("batch_size=auto: the device's memory holds %d at once", self.batch_size)
        return results

    def finalize(self, trainer: Trainer) -> None:
        """Combines the results of all ranks; call it after `Trainer.test`.

        Not a hook of `Trainer.test`, which calls none if there are no images left to compute.

        Raises:
            RunError: If images are missing, or files cannot be written.
        """
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        results = self._saved_results()
        if len(results) < self.count:
            raise RunError(
                f"{self.count - len(results)} of {self.count} images are missing in "
                f"{self.directory}; resume with: {shell_command('eval', resume=self.directory)}"
            )
        try:
            self.finish(results)
        except OSError as error:
            raise RunError(
                f"cannot write results to {self.directory}: {error}; free space there and resume "
                f"with: {shell_command('eval', resume=self.directory)}"
            ) from error
        log_results(trainer.loggers, self.directory)
        shutil.rmtree(self.directory / PARTIAL_DIR)
