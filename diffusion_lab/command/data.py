r"""The images by hand: pack them, check them, describe them.

    python -m diffusion_lab.data ingest data.source=/data/celeba_hq_256 experiment=ddpm_celeba
    python -m diffusion_lab.data verify ...
    python -m diffusion_lab.data stats ...

Overrides are those of train.py, so that a training with the same ones finds the images packed.
"""

__all__ = ["main"]

import logging
import sys
from functools import partial

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from diffusion_lab.command.validation import check_train
from diffusion_lab.data.cache import verify
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.data.splits import SPLITS
from diffusion_lab.errors import ConfigError, DataError, LabError
from diffusion_lab.metric.feature_statistics import PooledPixels, reference
from diffusion_lab.runs import compose
from diffusion_lab.runs.instantiate import instantiate


def _ingest(data: ImageDataModule) -> None:
    cache = data.open_cache()
    manifest, images = cache.manifest, data.images
    print(f"cache      {cache.directory}")
    print(f"source     {data.source}")
    print(f"images     {manifest['count']} of {data.size}x{data.size}, {manifest['kind']}")
    print("splits     " + ", ".join(f"{split} {len(images[split])}" for split in SPLITS))
    print(f"content    {manifest['content'][:16]}")
    print(f"decoder    {manifest['decoder']}")
    print(f"left out   {len(manifest['skipped'])}")
    for item in manifest["skipped"]:
        print(f"           {item['reason']}")


def _verify(data: ImageDataModule) -> None:
    cache = data.open_cache()
    bad = verify(cache)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(cache.names)} images in {cache.directory} are damaged: "
            + ", ".join(bad[:10])
            + (", ..." if len(bad) > 10 else "")
            + ". Remove that directory to make it again"
        )
    print(f"{len(cache.names)} images in {cache.directory} are as they were packed")


def _stats(data: ImageDataModule) -> None:
    hashes, extractor = data.state_dict()["splits"], PooledPixels()
    root = data.cache_dir / "statistics"
    for split in SPLITS:
        images = data.images[split]
        if not len(images):
            continue
        moments, path = reference(
            images, hashes[split]["content"], extractor, root,
            progress=partial(tqdm, desc=f"reading {split}", leave=False),
        )  # fmt: skip
        # The last six features are x_0 and x_0² averaged over all pixels.
        first, second = moments.mean[-6:].reshape(2, 3)
        std, total = (second - first**2).sqrt(), (second.mean() - first.mean() ** 2).sqrt()
        print(
            f"{split:6} {len(images):7d} images, x_0 in [-1, 1]: mean "
            + " ".join(f"{v:+.4f}" for v in first.tolist())
            + ", std " + " ".join(f"{v:.4f}" for v in std.tolist())
            + f" (R G B), over all {float(total):.4f}"
        )  # fmt: skip
        print(f"       reference statistics of {extractor.name}, n = {moments.n}: {path}")


COMMANDS = {"ingest": _ingest, "verify": _verify, "stats": _stats}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        print(f"choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = compose("train", arguments[1:])
        check_train(config)
        if config.data.cache == "none":
            raise ConfigError("data.cache=none packs nothing; choose data.cache=uint8 or bytes")
        data = instantiate(config.data, "data")
        data.open()
        COMMANDS[arguments[0]](data)
    except (LabError, HydraException, OmegaConfBaseException) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
