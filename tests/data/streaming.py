"""Streams a parquet file, and prints the resident memory: before, at most, and unbounded.

    python streaming.py <file> <size> <bound in bytes>

A process of its own: what others leave behind would hide it.
"""

import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from diffusion_lab.data.images import SourceImages, Split
from diffusion_lab.data.loader import Loader
from diffusion_lab.data.order import lanes
from diffusion_lab.data.source import ParquetSource
from diffusion_lab.data.storage import LocalStorage


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def stream(images: SourceImages, batches: int | None = None) -> tuple[int, int]:
    """Reads an epoch, or its first batches; returns the most memory after a batch, and a sum."""
    split = Split(images, np.arange(len(images.names)))
    order = partial(lanes, groups=split.groups, count=4, window=1)
    loader = Loader(split, "train", 8, seed=0, order=order, tail="spread", workers=2)
    most = total = 0
    for batch in islice(loader, batches):
        total += int(batch["image"][:, 0, 0, 0].sum())
        most = max(most, resident())
    return most, total


def main() -> None:
    path, size, bound = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    source = ParquetSource(LocalStorage(path), size)
    stream(SourceImages(source, 0), 4)  # loads what is loaded at first use
    before = resident()
    images = SourceImages(source, bound)
    bounded, total = stream(images)
    everything = SourceImages(source, 1 << 40)
    everything.gather(np.array([group.start for group in source.groups]))
    print(json.dumps({
        "before": before, "bounded": bounded, "unbounded": resident(),
        "kept": sum(images._bytes.values()), "reads": images.reads, "sum": total,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
