r"""The Fréchet distance of drawn images from the training images, while training goes on.

    d² of the features of n images drawn by the averaged weights, and of those of all training
    images: see `metric.frechet`.

Image i is a function of the weights and (seed, i), and batch k holds the images k B, ...,
(k + 1) B - 1, whichever device draws it: the distance is the same on any number of devices. With
few images and few steps it is too large; it shows the course of a training, and is named by n and
by the features (`val/fid_5k`, `val/frechet_efficientnet_256`). Figures to report are those of
`eval.py task=fid`.
"""

__all__ = ["FID"]

import logging
import time
from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.metric.feature_statistics import Moments, reference
from diffusion_lab.metric.features import extract, title
from diffusion_lab.metric.frechet import frechet_distance
from diffusion_lab.pixels import to_uint8
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import Sampler
from diffusion_lab.training.module import DiffusionModule

FEW = 2  # images, and steps, of a debug run

log = logging.getLogger(__name__)


class FID(Callback):
    """Measures the averaged weights after a validation, every N steps and at the end of a run.

    The extractor is made at once, so that weights which are missing end the run before it begins.
    It belongs to the callback and not to the module: no checkpoint holds it.

    Arguments:
        sampler: Draws the images, in few steps.
        extractor: Makes the extractor.
        num_samples: The number n of images, >= 2.
        every_n_steps: The least number of steps between two measurements; a run of at least as
            many steps is measured at its end, too. None measures never.
        batch_size: Images that one device draws at once.
        seed: Seed of the noise.

    Raises:
        ValueError: If n is below 2.
        ConfigError: If the extractor's weights are missing.
    """

    def __init__(
        self,
        sampler: Sampler,
        extractor: Callable[[], nn.Module],
        num_samples: int = 5000,
        every_n_steps: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples} is not allowed; it is at least 2")
        self.sampler, self.num_samples = sampler, num_samples
        self.every_n_steps, self.batch_size, self.seed = every_n_steps, batch_size, seed
        self.extractor: nn.Module | None = None
        if every_n_steps is not None:
            try:
                self.extractor = extractor()
            except ConfigError as error:
                way_out = "fid.every_n_steps=null trains without this distance"
                raise ConfigError(f"{error}; {way_out}") from error
        self.reference: Moments | None = None
        self.measured_step = 0

    def state_dict(self) -> dict[str, int]:
        """Returns when it was measured last, so that a resumed run measures at the same steps."""
        return {} if self.extractor is None else {"measured_step": self.measured_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.measured_step = state["measured_step"]

    def setup(self, trainer: Trainer, module: DiffusionModule, stage: str) -> None:
        """Holds the sampler against the schedule.

        Raises:
            ConfigError: If it is not defined under it, or takes more steps than it has.
        """
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

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Finds the statistics of the training images, and computes them if they are not kept."""
        if self.extractor is None:
            return
        self.extractor.to(module.device)
        data = trainer.datamodule
        images = data.images["train"]
        if trainer.fast_dev_run:
            self.sampler = copy(self.sampler)
            self.sampler.steps = min(FEW, self.sampler.steps)
            few = torch.from_numpy(images[:FEW]).to(module.device)
            self.reference = Moments.of(extract(self.extractor, few))
            return
        self.reference, _ = reference(
            images, data.state_dict()["splits"]["train"]["content"], self.extractor,
            data.cache_dir / "statistics", device=module.device,
            progress=partial(
                tqdm, desc=f"{self.extractor.name} of the training images", leave=False,
                disable=not trainer.is_global_zero,
            ),
        )  # fmt: skip

    def on_validation_epoch_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        step = trainer.global_step
        if self.extractor is None or self.reference is None or trainer.sanity_checking:
            return
        # A run that is shorter is there to try something: not for thousands of images at its end.
        last = step == trainer.max_steps and step >= self.every_n_steps
        due = step - self.measured_step >= self.every_n_steps or last
        if not (due or trainer.fast_dev_run):
            return
        self.measured_step = step
        start = time.perf_counter()
        count = min(FEW, self.num_samples) if trainer.fast_dev_run else self.num_samples
        drawn = self._drawn(trainer, module, count)
        distance = float("nan") if drawn is None else frechet_distance(drawn, self.reference)
        name = f"val/{title('frechet', self.extractor.name, count)}"
        # Every device has the same value; asking for it keeps Lightning from warning.
        self.log(name, distance, sync_dist=True)
        seconds = time.perf_counter() - start
        log.info("step %d: %s = %.4g, in %.0f s", step, name, distance, seconds)

    def _drawn(self, trainer: Trainer, module: DiffusionModule, count: int) -> Moments | None:
        """The moments of drawn images over all devices; None if the sampler diverged."""
        own, diverged = Moments(self.extractor.dim), False
        batches = torch.arange(count, device=module.device).split(self.batch_size)
        for index in batches[trainer.global_rank :: trainer.world_size]:
            try:
                with trainer.precision_plugin.forward_context():
                    images = self._sample(trainer, module, index)
            except SamplingError as error:  # of an early network; training goes on
                log.warning("no Fréchet distance at step %d: %s", trainer.global_step, error)
                diverged = True
                break
            own.update(extract(self.extractor, images.permute(0, 2, 3, 1)))
        if trainer.world_size == 1:
            return None if diverged else own
        facts = torch.tensor([own.n, diverged], dtype=torch.float64)
        packed = torch.cat([facts, own.mean, own.scatter.flatten()]).to(module.device)
        total = Moments(self.extractor.dim)
        for part in trainer.strategy.all_gather(packed).cpu():  # one of each device, in order
            if part[1]:
                return None
            one = Moments(self.extractor.dim)
            one.n, one.mean = int(part[0]), part[2 : 2 + one.mean.numel()]
            one.scatter = part[2 + one.mean.numel() :].reshape_as(one.scatter)
            total.merge(one)
        return total

    def _sample(self, trainer: Trainer, module: DiffusionModule, index: Tensor) -> Tensor:
        size = trainer.datamodule.size
        generator = KeyedGenerator(make_key(self.seed, "fid", index))
        start = module.schedule.prior((len(index), 3, size, size), generator)
        return to_uint8(self.sampler(module.denoiser(), start, generator=generator))
