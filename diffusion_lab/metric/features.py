"""What the feature extractors share: arithmetic, weights, and the names of their figures.

An extractor maps uint8 images (B, H, W, 3) to float32 features (B, d), and has a `name` that tells
its features from all others and their number `dim`.
"""

__all__ = ["INCEPTION", "extract", "find_weights", "load_weights", "sha256", "title"]

import hashlib
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from diffusion_lab.errors import ConfigError

INCEPTION = "inception-v3-compat"  # the features that FID and KID are defined by
OWN = {"frechet": "fid", "kernel": "kid"}  # names that belong to them alone
BATCH, BATCH_CPU = 64, 8  # images at once; few of them stay in a processor's cache

log = logging.getLogger(__name__)


def title(figure: str, extractor: str, n: int) -> str:
    """Returns what a figure is called: by its features and its number of images.

    Arguments:
        figure: "frechet", "kernel", "precision" or "recall".
        extractor: The extractor's name.
        n: The number of images, which the figure depends on.
    """
    count = f"{n // 1000}k" if n % 1000 == 0 else str(n)
    if extractor == INCEPTION and figure in OWN:
        return f"{OWN[figure]}_{count}"
    return f"{figure}_{extractor.split('-')[0]}_{count}"


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Neither the trainer's half precision nor TF32: both change the features visibly."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
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
def extract(extractor: Any, images: Tensor) -> Tensor:
    """Returns the features of images, float32, of shape (N, d), on the CPU.

    Arguments:
        extractor: The extractor, on the images' device.
        images: uint8, of shape (N, H, W, 3).
    """
    parts = images.split(BATCH_CPU if images.device.type == "cpu" else BATCH)
    with _float32(images.device):
        return torch.cat([extractor(part).float().cpu() for part in parts])


def find_weights(path: str | None, url: str) -> Path:
    """Returns the file of an extractor's weights, which is downloaded if it is nowhere.

    Arguments:
        path: The file as the key `extractor.weights` names it; None looks in torch's own cache.
        url: Where it comes from; its name there is that in the cache.

    Raises:
        ConfigError: If there is no such file, and it cannot be downloaded.
    """
    name = url.rpartition("/")[2]
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"extractor.weights={path} is no file; give a copy of {url}, or null to look for "
                "it in torch's cache and to download it"
            )
        return file
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # several processes may want it
            if not file.is_file():
                log.info("downloading %s to %s", url, file)
                torch.hub.download_url_to_file(url, str(file), progress=False)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ConfigError(
            f"the extractor's weights {file} are not there and cannot be downloaded ({reason}); "
            f"fetch {url} on another machine and put it there, or name it by "
            "extractor.weights=<file>; extractor=efficientnet needs no download"
        ) from error
    return file


def sha256(path: Path) -> str:
    """Returns the hash of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads weights without running code that a file may hold.

    Raises:
        ConfigError: If the file is damaged, or holds anything but tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.PickleError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ConfigError:
    """Makes the error that names a file of weights which cannot be used."""
    reason = str(error).strip().splitlines()[0].rstrip(".:")
    return ConfigError(
        f"the extractor's weights {path} cannot be used ({reason}); remove that file to download "
        "it again, or name another one: extractor.weights=<file>"
    )
