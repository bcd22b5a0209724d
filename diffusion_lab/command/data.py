r"""Command line for packed images: create, verify and summarize the cache of a data source.

    python -m diffusion_lab.command.data ingest data.source=/data/celeba experiment=ddpm_celeba
    python -m diffusion_lab.command.data verify ...
    python -m diffusion_lab.command.data stats ...

The overrides are those of train.py; a training run with the same ones uses the same cache.
"""

__all__ = ["main"]

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from diffusion_lab.command.validation import check_train
from diffusion_lab.data.cache import verify
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.data.splits import SPLITS
from diffusion_lab.errors import ConfigError, DataError, LabError
from diffusion_lab.metric.feature_statistics import PooledPixels, load_reference
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
    print(f"skipped    {len(manifest['skipped'])}")
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
            + ". Remove that directory to create it again"
        )
    print(f"{len(cache.names)} images in {cache.directory} are unchanged since they were packed")


def _stats(data: ImageDataModule) -> None:
    hashes, extractor = data.state_dict()["splits"], PooledPixels()
    root = data.cache_dir / "statistics"
    for split in SPLITS:
        images = data.images[split]
        if not len(images):
            continue
        moments, path = load_reference(
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


COMMANDS = {
    "ingest": (_ingest, "pack the images and show what the cache holds"),
    "verify": (_verify, "compare the packed pixels with their hashes"),
    "stats": (_stats, "show mean and std of x_0, and write the reference statistics"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_lab.command.data",
        description="Create, verify or summarize the packed images of a data source.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "overrides", nargs="*", metavar="key=value",
            help="overrides as for train.py, for example data.source=/data/celeba",
        )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Arguments:
        arguments: The arguments of the command line; None takes those of the process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = compose("train", options.overrides)
        check_train(config)
        if config.data.cache == "none":
            raise ConfigError("data.cache=none has no cache; set data.cache=uint8 or bytes")
        data = instantiate(config.data, "data")
        data.open()
        COMMANDS[options.command][0](data)
    except (LabError, HydraException, OmegaConfBaseException) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
