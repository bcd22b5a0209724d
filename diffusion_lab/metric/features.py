"""Feature extractors: their interface, arithmetic, weights, and the names of metrics."""

__all__ = [
    "INCEPTION", "Extractor", "extract", "find_weights", "load_weights", "metric_name", "sha256",
]  # fmt: skip

import hashlib
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from torch import Tensor

from diffusion_lab.errors import ConfigError

INCEPTION = "inception-v3-compat"  # the features that define FID and KID
INCEPTION_NAMES = {"frechet": "fid", "kernel": "kid"}  # names of metrics of these features
BATCH, BATCH_CPU = 64, 8  # images per batch; on CPUs few of them, so that they stay in the cache

log = logging.getLogger(__name__)


class Extractor(Protocol):
    """Maps uint8 images (B, H, W, 3) to float32 features (B, d).

    Attributes:
        name: Identifies the features, also in file names.
        dim: The number d of features.
    """

    name: str
    dim: int

    def __call__(self, images: Tensor, /) -> Tensor: ...


def metric_name(metric: str, extractor: str, n: int) -> str:
    """Returns the name of a metric with its features and number of images, such as fid_50k.

    Arguments:
        metric: "frechet", "kernel", "precision" or "recall".
        extractor: The extractor's name.
        n: The number of images, on which the metric depends.
    """
    count = f"{n // 1000}k" if n % 1000 == 0 else str(n)
    if extractor == INCEPTION and metric in INCEPTION_NAMES:
        return f"{INCEPTION_NAMES[metric]}_{count}"
    return f"{metric}_{extractor.split('-')[0]}_{count}"


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Disables autocast and TF32: both change the features visibly."""
    backends = (
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]  # missing in the types of torch
        torch.backends.cuda.matmul,
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor) -> Tensor:
    """Returns the features of images, float32, of shape (N, d), on the CPU.

    Arguments:
        extractor: The extractor, on the images' device.
        images: uint8, of shape (N, H, W, 3).
    """
    parts = torch.split(images, BATCH_CPU if images.device.type == "cpu" else BATCH)
    with _float32(images.device):
        return torch.cat([extractor(part).float().cpu() for part in parts])


def find_weights(path: str | None, url: str) -> Path:
    """Returns the file of the weights of an extractor, and downloads it if it is missing.

    Arguments:
        path: The file, the key `extractor.weights`; None looks in the cache of torch.
        url: The address of the weights; the file in the cache has the same name.

    Raises:
        ConfigError: If the file does not exist, or cannot be downloaded.
    """
    name = url.rpartition("/")[2]
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"extractor.weights={path} is not a file; give a copy of {url}, or null to use "
                "the cache of torch and download it there"
            )
        return file
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # several processes may need it
            if not file.is_file():
                log.info("downloading %s to %s", url, file)
                torch.hub.download_url_to_file(url, str(file), progress=False)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ConfigError(
            f"the weights of the extractor {file} are missing and cannot be downloaded "
            f"({reason}); copy {url} there from another machine, or set extractor.weights=<file>; "
            "extractor=efficientnet needs no download"
        ) from error
    return file


def sha256(path: Path) -> str:
    """Returns the hash of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads weights without executing code in the file.

    Raises:
        ConfigError: If the file is damaged, or contains anything but tensors.
    """
    try:
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return weights
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.PickleError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ConfigError:
    """Returns the error for a file of weights that cannot be used."""
    reason = str(error).strip().splitlines()[0].rstrip(".:")
    return ConfigError(
        f"the weights of the extractor {path} cannot be used ({reason}); delete the file to "
        "download it again, or set extractor.weights=<file>"
    )
