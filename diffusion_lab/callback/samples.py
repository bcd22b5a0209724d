"""Sample grids and denoised validation images during training."""

__all__ = ["SampleGrid"]

import logging
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from PIL.Image import Image
from torchvision.transforms.functional import to_pil_image

from diffusion_lab.callback.sample_animation import (
    levels,
    log_picture,
    nearest,
    progressive,
)
from diffusion_lab.callback.trainer_state import (
    data_module,
    diffusion_module,
    image_shape,
    is_debug_run,
)
from diffusion_lab.constraints import NonEmptyStr, NonNegativeInt, PositiveInt, checked
from diffusion_lab.data.images import SourceImages
from diffusion_lab.errors import ConfigError, SamplingError
from diffusion_lab.guidance import MMSE, Observation, TruncatedReverseSDE
from diffusion_lab.pixels import to_model
from diffusion_lab.report.image_grid import image_grid, labelled_grid
from diffusion_lab.report.trajectory import TrajectoryRecorder
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import EulerMaruyama, Sampler
from diffusion_lab.schedule import Schedule
from diffusion_lab.training.module import DiffusionModule

log = logging.getLogger(__name__)


class SampleGrid(Callback):
    """Draws images with the averaged weights after validation, as PNG files and for the loggers.

    The noise is the same every time, so that a series shows the progress of the training:

        samples/grid         samples of the prior
        samples/progressive  x_t and E[x_0 | x_t] of the first samples along the reverse process
        samples/nearest      the first samples and the training images nearest to them; omitted if
                             images are streamed from their source
        samples/denoise      validation images at σ_t = 0.5: clean, noisy, the estimate E[x_0 | y],
                             and samples of the posterior
        samples/levels       a validation image at ten noise levels, and E[x_0 | x_t]

    Arguments:
        directory: Directory of the PNG files.
        sampler: Sampler of the prior.
        num_samples: Number of samples.
        every_n_steps: Smallest number of steps between two grids; the last step always draws one.
        seed: Seed of the noise.
    """

    ROWS, POSTERIOR_SAMPLES, POSTERIOR_STEPS = 4, 3, 16  # maxima
    PROGRESSIVE_ROWS, PROGRESSIVE_COLUMNS = 3, 8  # largest, and approximate number
    COMPARED = 2048  # training images that are compared with the samples
    SIGMA_T = 0.5
    SIGMA_Y = SIGMA_T / (1 - SIGMA_T**2) ** 0.5

    @checked
    def __init__(
        self,
        directory: NonEmptyStr,
        sampler: Sampler,
        num_samples: PositiveInt = 16,
        every_n_steps: PositiveInt = 1000,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.directory = Path(directory)
        self.sampler, self.num_samples = sampler, num_samples
        self.every_n_steps, self.seed = every_n_steps, seed
        self.drawn_step = 0

    @classmethod
    def check_schedule(cls, sampler: Sampler, schedule: Schedule) -> None:
        """Checks that every picture can be drawn under the schedule of the training.

        Arguments:
            sampler: The sampler of the prior.
            schedule: The schedule.

        Raises:
            ConfigError: If a sampler is not defined under it, or it does not have the noise level
                of the denoised images.
        """
        try:
            sampler.check(schedule)
            cls._posterior_sampler(sampler).check(schedule)
        except ValueError as error:
            raise ConfigError(f"callbacks.samples: {error}") from error
        low, high = schedule.ratio_range()
        if not low <= cls.SIGMA_Y <= high:
            raise ConfigError(
                f"the schedule {type(schedule).__name__} has noise levels σ/α from {low:.4g} to "
                f"{high:.4g}; callbacks.samples denoises images at {cls.SIGMA_Y:.4g}, which must "
                "be one of them. Change the schedule, or train without these pictures: "
                "~callbacks.samples"
            )

    @classmethod
    def _posterior_sampler(cls, sampler: Sampler) -> Sampler:
        return EulerMaruyama(min(cls.POSTERIOR_STEPS, sampler.steps))

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.check_schedule(self.sampler, diffusion_module(module).schedule)

    def state_dict(self) -> dict[str, int]:
        """Returns the step of the last grid, so that a resumed run draws at the same steps."""
        return {"drawn_step": self.drawn_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn_step = state["drawn_step"]

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        module = diffusion_module(module)
        step = trainer.global_step
        due = step - self.drawn_step >= self.every_n_steps or step == trainer.max_steps
        if trainer.sanity_checking or not (due or is_debug_run(trainer)):
            return
        self.drawn_step = step
        if trainer.is_global_zero:
            try:
                with trainer.precision_plugin.forward_context():
                    pictures = {
                        **self._prior(trainer, module),
                        "samples/denoise": self._posterior(trainer, module),
                        "samples/levels": self._levels(trainer, module),
                    }
            except SamplingError as error:  # an untrained network can diverge; training continues
                log.warning("no sample grid at step %d: %s", step, error)
                pictures = {}
            for name, picture in pictures.items():
                path = self.directory / f"{name.split('/')[1]}-{step:07d}.png"
                log_picture(trainer, name, picture, path)
        trainer.strategy.barrier("samples")

    def _generator(self, module: DiffusionModule, name: str, count: int) -> KeyedGenerator:
        index = torch.arange(count, device=module.device)
        return KeyedGenerator(make_key(self.seed, name, index))

    def _prior(self, trainer: Trainer, module: DiffusionModule) -> dict[str, Image]:
        generator = self._generator(module, "sample grid", self.num_samples)
        shape = image_shape(trainer, module)
        start = module.schedule.prior((self.num_samples, *shape), generator)
        # The classes in turn, if the network is conditional.
        classes = getattr(module.network, "classes", 0)
        label = torch.arange(self.num_samples, device=module.device) % classes if classes else None
        denoiser = module.denoiser(label=label)
        stride = max(1, self.sampler.steps // self.PROGRESSIVE_COLUMNS)
        recorder = TrajectoryRecorder(module.schedule, self.PROGRESSIVE_ROWS, stride)
        images = self.sampler(denoiser, start, generator=generator, callback=recorder)
        columns = max(1, round(self.num_samples**0.5))
        pictures = {
            "samples/grid": to_pil_image(image_grid(images, columns)),
            "samples/progressive": progressive(recorder.result(), module.schedule),
        }
        data = data_module(trainer)
        if not isinstance(data.images["train"].images, SourceImages):
            pictures["samples/nearest"] = nearest(
                images[: self.ROWS], data.images["train"], self.COMPARED, data.flip
            )
        return pictures

    def _levels(self, trainer: Trainer, module: DiffusionModule) -> Image:
        images = data_module(trainer).images["val"][:1]
        x_0 = to_model(torch.tensor(images, device=module.device))
        return levels(module, x_0, self._generator(module, "levels", 1).normal(*x_0.shape[1:]))

    def _posterior(self, trainer: Trainer, module: DiffusionModule) -> Image:
        images = data_module(trainer).images["val"][: min(self.ROWS, self.num_samples)]
        x_0 = to_model(torch.tensor(images, device=module.device))
        sigma_y = self.SIGMA_Y
        noise = self._generator(module, "denoising row", len(x_0)).normal(*x_0.shape[1:])
        y = x_0 + sigma_y * noise
        denoiser, sampler = module.denoiser(), self._posterior_sampler(self.sampler)
        mmse = MMSE().estimate(denoiser, Observation(y, sigma_y))
        repeated = y.repeat_interleave(self.POSTERIOR_SAMPLES, 0)
        generator = self._generator(module, "posterior row", len(repeated))
        samples = TruncatedReverseSDE()(
            denoiser, sampler, Observation(repeated, sigma_y), generator=generator
        )
        samples = torch.unflatten(samples, 0, (len(x_0), self.POSTERIOR_SAMPLES))
        rows = [
            torch.cat([x_0[k : k + 1], y[k : k + 1], mmse[k : k + 1], samples[k]]).cpu()
            for k in range(len(x_0))
        ]
        names = [f"sample {m + 1}" for m in range(self.POSTERIOR_SAMPLES)]
        return labelled_grid(rows, ["clean", "noisy", "E[x_0 | y]", *names])
