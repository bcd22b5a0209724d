r"""Restoration tasks: of any operator, and of a noisy image whose noise level is stated.

Both draw posterior samples and grade them, see `diffusion_lab.task.restoration`.
"""

__all__ = ["Denoise", "Restore"]

import logging
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch

from diffusion_lab import noise_level
from diffusion_lab.constraints import (
    NonEmptyStr,
    NonNegative,
    Number,
    OpenUnit,
    Positive,
    PositiveInt,
    PositiveUnit,
    checked,
)
from diffusion_lab.errors import ConfigError
from diffusion_lab.guidance import Guidance
from diffusion_lab.operator import Gaussian, Identity, Operator, Poisson
from diffusion_lab.operator.noise_model import Noise
from diffusion_lab.pixels import to_model
from diffusion_lab.task.base import TaskArguments
from diffusion_lab.task.observations import (
    GivenObservation,
    ObservationSource,
    ObservedImages,
    PriorPairs,
)
from diffusion_lab.task.restoration import Restoration
from diffusion_lab.task.user_images import read_image, read_observation

log = logging.getLogger(__name__)


def _check_files(keys: Mapping[str, Any]) -> None:
    """Checks that at most one of `image` and `observation` is given."""
    image, observation = keys.get("image"), keys.get("observation")
    if image is not None and observation is not None:
        raise ConfigError(
            f"image={image} and observation={observation} exclude each other: noise is added to "
            "the first, the second is used as it is"
        )


class Restore(Restoration):
    """Restores images from y = A(x_0) + noise.

    Arguments:
        operator: The operator A.
        guidance: The posterior method.
        num_images: Number of test images; 1 with `image` or `observation`.
        num_samples: Number M of posterior samples of each image; 1 for deterministic methods.
        sigma_y: Standard deviation σ_y of the Gaussian noise, in the units of A(x_0).
        poisson_rate: Mean number of photons at white: Poisson noise in place of the Gaussian one.
        image: File of a clean image in place of the test images.
        observation: File of an observation, used as it is and not graded.
        resize: Whether a file of another size is cropped to the middle and scaled.
        common: See `Task`.

    Raises:
        ConfigError: If there are too few test images, they are too small, a file cannot be used,
            or the method is not defined for the operator and the noise.
    """

    @classmethod
    def check_keys(cls, keys: Mapping[str, Any]) -> None:
        _check_files(keys)

    @checked
    def __init__(
        self,
        *,
        operator: Operator,
        guidance: Guidance,
        num_images: PositiveInt,
        num_samples: PositiveInt,
        sigma_y: NonNegative = 0.05,
        poisson_rate: Positive | None = None,
        image: NonEmptyStr | None = None,
        observation: NonEmptyStr | None = None,
        resize: bool = False,
        **common: Unpack[TaskArguments],
    ) -> None:
        _check_files({"image": image, "observation": observation})
        noise = Gaussian(sigma_y) if poisson_rate is None else Poisson(poisson_rate)
        source = _source(operator, noise, image, observation, resize, num_images, common)
        single = image is not None or observation is not None
        super().__init__(
            operator=operator, noise=noise, guidance=guidance, source=source,
            num_images=1 if single else num_images, num_samples=num_samples, **common,
        )  # fmt: skip


class Denoise(Restoration):
    """Restores images from y = x_0 + σ_y n, with the noise level stated in one of four ways.

    At most one of `sigma_t`, `t`, `sigma_y` and `snr_db` is given; none means sigma_t=0.5, see
    `diffusion_lab.noise_level`.

    Arguments:
        operator: The identity; another operator is observed under the same σ_y.
        guidance: The posterior method.
        num_images: Number of test images; 1 with `image` or `observation`.
        num_samples: Number M of posterior samples of each image; 1 for deterministic methods.
        sigma_t: Standard deviation σ_t of the variance-preserving form.
        t: Time of the schedule.
        sigma_y: Standard deviation σ_y of the noise added to x_0.
        snr_db: Signal-to-noise ratio 20 log10(α/σ), in dB.
        truth_source: "data": test images. "model": pairs (x_t, x_0) from the prior's own reverse
            chain, which grade the sampler alone, not the network.
        poisson_rate: Mean number of photons at white: Poisson noise in place of the Gaussian one.
        image: File of a clean image in place of the test images.
        observation: File of an observation, used as it is and not graded.
        resize: Whether a file of another size is cropped to the middle and scaled.
        common: See `Task`.

    Raises:
        ValueError: If truth_source="model" is combined with an operator or a file.
        ConfigError: If the noise is stated twice, or its level lies outside of the schedule, and
            see `Restore`.
    """

    @classmethod
    def check_keys(cls, keys: Mapping[str, Any]) -> None:
        noise_level.chosen({key: keys.get(key) for key in noise_level.KEYS})
        _check_files(keys)
        rate = keys.get("poisson_rate")
        if rate is None:
            return
        given = [f"{key}={keys[key]}" for key in noise_level.KEYS if keys.get(key) is not None]
        given += ["truth_source=model"] * (keys.get("truth_source") == "model")
        if given:
            raise ConfigError(
                f"poisson_rate={rate} states the noise; remove {' and '.join(given)}, which is "
                "for Gaussian noise"
            )

    @checked
    def __init__(
        self,
        *,
        operator: Operator,
        guidance: Guidance,
        num_images: PositiveInt,
        num_samples: PositiveInt,
        sigma_t: OpenUnit | None = None,
        t: PositiveUnit | None = None,
        sigma_y: Positive | None = None,
        snr_db: Number | None = None,
        truth_source: Literal["data", "model"] = "data",
        poisson_rate: Positive | None = None,
        image: NonEmptyStr | None = None,
        observation: NonEmptyStr | None = None,
        resize: bool = False,
        **common: Unpack[TaskArguments],
    ) -> None:
        _check_files({"image": image, "observation": observation})
        run = common["run"]
        values = {"sigma_t": sigma_t, "t": t, "sigma_y": sigma_y, "snr_db": snr_db}
        self.check_keys({**values, "poisson_rate": poisson_rate, "truth_source": truth_source})
        level = None
        noise: Noise
        if poisson_rate is None:
            level = noise_level.resolve(run.denoiser.schedule, values)
            noise = Gaussian(level.sigma_y)
            log.info("noise: %s", level)
        else:
            noise = Poisson(poisson_rate)
        single = image is not None or observation is not None
        if truth_source == "model" and level is not None:
            if single or not isinstance(operator, Identity):
                raise ValueError(
                    "truth_source=model draws its own noisy images; remove image= and "
                    "observation=, and use operator=identity"
                )
            source: ObservationSource = PriorPairs(
                run.denoiser, run.shape, level.t, common["seed"]
            )
        else:
            source = _source(operator, noise, image, observation, resize, num_images, common)
        super().__init__(
            operator=operator, noise=noise, guidance=guidance, source=source, level=level,
            num_images=1 if single else num_images, num_samples=num_samples, **common,
        )  # fmt: skip


def _source(
    operator: Operator,
    noise: Noise,
    image: str | None,
    observation: str | None,
    resize: bool,
    num_images: int,
    common: TaskArguments,
) -> ObservationSource:
    """The observations of the user's file, or of the test images."""
    shape = common["run"].shape
    if observation is not None:
        return GivenObservation(read_observation(observation, operator, shape, resize))
    if image is not None:
        truth = read_image("image", image, shape, resize)
        return ObservedImages(
            lambda index: truth.to(index.device), operator, noise, common["seed"]
        )
    images = common["open_data"]().test_images(num_images)
    return ObservedImages(
        lambda index: to_model(torch.from_numpy(images[index.cpu().numpy()]).to(index.device)),
        operator, noise, common["seed"],
    )  # fmt: skip
