r"""Fréchet distance between samples and training images, measured during training.

The distance d² is that of the features of n images drawn with the averaged weights and of all
training images, see `diffusion_lab.metric.frechet`.

Image i is a function of the weights and (seed, i), and batch k has the images k B, ...,
(k + 1) B - 1 on any device, so that the distance does not depend on the number of devices. It is
biased upwards for few images and few steps; it monitors a training, and its name has n and the
features (`val/fid_5k`, `val/frechet_efficientnet_256`). Use `eval.py task=fid` for values to
report.
"""

__all__ = ["FID"]

import logging
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_lab.callback.trainer_state import (
    data_module,
    diffusion_module,
    image_shape,
    is_debug_run,
)
from diffusion_lab.constraints import AtLeastTwo, NonNegativeInt, PositiveInt, checked
from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.metric.feature_statistics import Moments, load_reference
from diffusion_lab.metric.features import extract, metric_name
from diffusion_lab.metric.frechet import frechet_distance
from diffusion_lab.pixels import to_uint8
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import Sampler
from diffusion_lab.training.module import DiffusionModule

DEBUG_COUNT = 2  # images and sampling steps of a debug run

log = logging.getLogger(__name__)


class FID(Callback):
    """Measures the averaged weights after a validation, every N steps and at the end of a run.

    The extractor is built in the constructor, so that missing weights stop the run early. It is
    part of the callback and not of the module, so that no checkpoint contains it.

    Arguments:
        sampler: Sampler of the images, with few steps.
        extractor: Returns the feature extractor.
        num_samples: Number n of images.
        every_n_steps: Smallest number N of steps between two measurements; a run of at least N
            steps is also measured at its end. None never measures.
        batch_size: Number of images that one device draws at once.
        seed: Seed of the noise.

    Raises:
        ConfigError: If the weights of the extractor are missing.
    """

    @checked
    def __init__(
        self,
        sampler: Sampler,
        extractor: Callable[[], nn.Module],
        num_samples: AtLeastTwo = 5000,
        every_n_steps: PositiveInt | None = None,
        batch_size: PositiveInt = 64,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.sampler, self.num_samples = sampler, num_samples
        self.every_n_steps, self.batch_size, self.seed = every_n_steps, batch_size, seed
        self.extractor: Any = None  # a module with `name` and `dim`
        if every_n_steps is not None:
            try:
                self.extractor = extractor()
            except ConfigError as error:
                way_out = "fid.every_n_steps=null trains without this distance"
                raise ConfigError(f"{error}; {way_out}") from error
        self.reference: Moments | None = None
        self.measured_step = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the step of the last measurement, for a resumed run."""
        return {} if self.extractor is None else {"measured_step": self.measured_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.measured_step = state["measured_step"]

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Checks the sampler under the schedule.

        Raises:
            ConfigError: If it is not defined under the schedule, or takes more steps than the
                schedule has.
        """
        module = diffusion_module(module)
        if self.extractor is None:
            return
        schedule, steps = module.schedule, self.sampler.steps
        try:
            self.sampler.check(schedule)
        except ValueError as error:
            raise ConfigError(f"fid.sampler: {error}") from error
        if steps > schedule.steps and not getattr(self.sampler, "adaptive", False):
            raise ConfigError(
                f"fid.sampler.steps={steps} is more than the {schedule.steps} steps of the "
                f"schedule (schedule.steps); lower it to at most {schedule.steps}"
            )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Loads the statistics of the training images, or computes and stores them."""
        if self.extractor is None:
            return
        self.extractor.to(module.device)
        data = data_module(trainer)
        images = data.images["train"]
        if is_debug_run(trainer):
            self.sampler = copy(self.sampler)
            self.sampler.steps = min(DEBUG_COUNT, self.sampler.steps)
            few = torch.from_numpy(images[:DEBUG_COUNT]).to(module.device)
            self.reference = Moments.of(extract(self.extractor, few))
            return
        self.reference, _ = load_reference(
            images, data.state_dict()["splits"]["train"]["content"], self.extractor,
            data.cache_dir / "statistics", device=module.device,
            progress=partial(
                tqdm, desc=f"{self.extractor.name} of the training images", leave=False,
                disable=not trainer.is_global_zero,
            ),
        )  # fmt: skip

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module = diffusion_module(module)
        step = trainer.global_step
        if self.every_n_steps is None or self.reference is None or trainer.sanity_checking:
            return
        # Shorter runs are tests, which should not draw thousands of images at their end.
        last = step == trainer.max_steps and step >= self.every_n_steps
        due = step - self.measured_step >= self.every_n_steps or last
        if not (due or is_debug_run(trainer)):
            return
        self.measured_step = step
        start = time.perf_counter()
        count = min(DEBUG_COUNT, self.num_samples) if is_debug_run(trainer) else self.num_samples
        drawn = self._moments(trainer, module, count)
        distance = float("nan") if drawn is None else frechet_distance(drawn, self.reference)
        name = f"val/{metric_name('frechet', self.extractor.name, count)}"
        # Every device has the same value; without sync_dist Lightning would warn.
        module.log(name, distance, sync_dist=True)
        seconds = time.perf_counter() - start
        log.info("step %d: %s = %.4g, in %.0f s", step, name, distance, seconds)

    def _moments(self, trainer: Trainer, module: DiffusionModule, count: int) -> Moments | None:
        """The moments of the drawn images over all devices; None if the sampler diverged."""
        own, diverged = Moments(self.extractor.dim), False
        batches = torch.split(torch.arange(count, device=module.device), self.batch_size)
        for index in batches[trainer.global_rank :: trainer.world_size]:
            try:
                with trainer.precision_plugin.forward_context():
                    images = self._sample(trainer, module, index)
            except SamplingError as error:  # an untrained network can diverge; training continues
                log.warning("no Fréchet distance at step %d: %s", trainer.global_step, error)
                diverged = True
                break
            own.update(extract(self.extractor, images.permute(0, 2, 3, 1)))
        if trainer.world_size == 1:
            return None if diverged else own
        header = torch.tensor([own.n, diverged], dtype=torch.float64)
        packed = torch.cat([header, own.mean, own.scatter.flatten()]).to(module.device)
        total = Moments(self.extractor.dim)
        for part in trainer.strategy.all_gather(packed).cpu():  # one part per device, in order
            if part[1]:
                return None
            one = Moments(self.extractor.dim)
            one.n, one.mean = int(part[0]), part[2 : 2 + one.mean.numel()]
            one.scatter = part[2 + one.mean.numel() :].reshape_as(one.scatter)
            total.merge(one)
        return total

    def _sample(self, trainer: Trainer, module: DiffusionModule, index: Tensor) -> Tensor:
        shape = image_shape(trainer, module)
        generator = KeyedGenerator(make_key(self.seed, "fid", index))
        start = module.schedule.prior((len(index), *shape), generator)
        return to_uint8(self.sampler(module.denoiser(), start, generator=generator))
