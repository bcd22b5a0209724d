"""Resident memory while a parquet file is streamed: before, maximum, and without a limit.

    python streaming_source.py <file> <size> <limit in bytes>

It runs in a separate process, because memory of other tests would hide the result.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.images import SourceImages


def resident() -> int:
    """The resident memory of this process, in bytes."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def open_data(path: Path, size: int, bound: int) -> ImageDataModule:
    data = ImageDataModule(
        str(path), size, 4, {"train": 1, "val": 0, "test": 0}, cache="none", order="interleave",
        interleave=3, shuffle_buffer=1, memory=bound / 2**30, drop_last=False, num_workers=1,
    )  # fmt: skip
    data.open()
    return data


def stream(data: ImageDataModule, batches: int | None = None) -> tuple[int, int]:
    """Reads an epoch or its first batches; returns the maximum memory after a batch, and a sum."""
    most = total = 0
    for batch in islice(data.train_dataloader(), batches):
        total += int(batch["image"][:, 0, 0, 0].sum())
        most = max(most, resident())
    return most, total


def main() -> None:
    path, size, bound = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    stream(open_data(path, size, 1), 4)  # loads modules that are imported at first use
    before = resident()
    data = open_data(path, size, bound)
    bounded, total = stream(data)
    images = data.images["train"].images
    everything = SourceImages(images.source, 1 << 40)
    everything.gather(np.array([group.start for group in images.groups]))
    print(json.dumps({
        "before": before, "bounded": bounded, "unbounded": resident(),
        "kept": sum(images.source.group_bytes[k] for k in images._kept), "reads": images.reads,
        "sum": total,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
