"""Speed of loading images, and memory of streaming them.

    python benchmarks/data.py

Draws 1,500 photo-like images of 256x256 (noise with a spectrum like that of photographs, and
shapes), stores them as JPEG, PNG and parquet files in a temporary directory, and times all ways
through the data module and, beside them, a torch DataLoader over the same files. The files are in
the page cache, batches are discarded, and the paths run alternately, so that other processes
affect all of them. Then a set ten times larger than data.memory is streamed in a process of its
own, whose resident memory is recorded. Writes benchmarks/results/data.md.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import RESULTS, cpu_name, versions
from diffusion_lab.data import ImageDataModule, decode
from diffusion_lab.data.cache import PackedCache, ingest
from diffusion_lab.data.registry import open_source

SIZE, IMAGES, PNGS, BATCH, ROWS, ROUNDS = 256, 1500, 300, 64, 100, 5
MEMORY, TIMES = 0.25, 10  # data.memory in GiB; how many times larger the streamed set is
FAST_EPOCHS = 10  # of pixels at hand, of which one epoch is too short to time
CORES = os.cpu_count() or 1
THREADS = min(8, CORES)  # of ingest
PILLOW = ", Pillow only"  # without simplejpeg


def draw(rng: np.random.Generator) -> Image.Image:
    """One image: noise whose amplitude falls with the frequency, and translucent ellipses."""
    y, x = np.mgrid[:SIZE, :SIZE]
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE))
    frequency[0, 0] = np.inf
    waves = rng.standard_normal((2, 3, *frequency.shape)) / frequency**1.3
    noise = np.fft.irfft2(waves[0] + 1j * waves[1], (SIZE, SIZE))
    noise /= noise.std((1, 2), keepdims=True)
    image = 128 + 40 * (noise[:1] + 0.3 * noise).transpose(1, 2, 0)  # mostly grey
    for _ in range(4):
        (center_x, center_y), (a, b) = rng.uniform(0, SIZE, 2), rng.uniform(20, 80, 2)
        inside = ((x - center_x) / a) ** 2 + ((y - center_y) / b) ** 2 < 1
        image[inside] = (image[inside] + rng.uniform(0, 255, 3)) / 2
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def make_images(root: Path) -> list[bytes]:
    """Writes the folders of JPEG and PNG files and one parquet file; returns the JPEGs."""
    rng, encoded = np.random.default_rng(0), []
    for name in ("jpeg", "jpeg75", "png", "parquet"):
        (root / name).mkdir()
    for k in range(IMAGES):
        image, buffer = draw(rng), io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
        (root / "jpeg" / f"{k:05}.jpg").write_bytes(encoded[-1])
        image.save(root / "jpeg75" / f"{k:05}.jpg", quality=75)
        if k < PNGS:
            image.save(root / "png" / f"{k:05}.png")
    write_parquet(root / "parquet" / "part.parquet", encoded)
    return encoded


def write_parquet(path: Path, images: Iterable[bytes]) -> None:
    """Writes images the way the hub does, in row groups of 100."""
    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind)})
    parquet.write_table(table, path, row_group_size=ROWS, compression="none", use_dictionary=False)


def data_module(source: Path, workers: int, **changes: Any) -> ImageDataModule:
    splits = changes.pop("splits", {"train": 1, "val": 0, "test": 0})
    data = ImageDataModule(str(source), SIZE, BATCH, splits, num_workers=workers, **changes)
    data.open()
    return data


class Files(Dataset):
    """The usual way: a file is opened by Pillow when it is asked for. Left uint8, as ours is."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        with Image.open(self.paths[k]) as image:
            return {"image": torch.from_numpy(np.array(image.convert("RGB")))}


def read(batches: Iterable, epochs: int = 1) -> int:
    """Reads epochs to their end; returns the number of images."""
    return sum(len(batch["image"]) for _ in range(epochs) for batch in batches)


def ways(root: Path) -> dict[tuple[str, str], Callable[[], Callable[[], int]]]:
    """All that is compared, by name and workers: a call prepares a pass, which is then timed."""

    def pack(folder: str, kind: str, target: str) -> Callable[[], PackedCache]:
        shutil.rmtree(root / target, ignore_errors=True)
        source = open_source(str(root / folder), SIZE, {})
        return lambda: ingest(source, root / target, kind, progress=False)

    def packing(kind: str) -> Callable[[], int]:
        run = pack("jpeg", kind, "new")
        return lambda: len(run().names)

    def ours(source: Path, workers: int, epochs: int = 1, **changes: Any) -> Callable[[], int]:
        # Opened every time: an open module keeps the row groups that it has read.
        loader = data_module(source, workers, **changes).train_dataloader()
        return lambda: read(loader, epochs)

    pixels = pack("jpeg", "uint8", "pixels")().directory
    jpeg, jpeg75, png = (
        pack(name, "bytes", f"{name}-bytes")().directory for name in ("jpeg", "jpeg75", "png")
    )
    streamed = {"cache": "none", "memory": MEMORY}
    result = {("cache=uint8", "0"): partial(ours, pixels, 0, FAST_EPOCHS)}
    for name, source, changes in (
        ("cache=bytes, JPEG", jpeg, {}),
        (f"cache=bytes, JPEG{PILLOW}", jpeg, {}),
        ("cache=bytes, JPEG of quality 75", jpeg75, {}),
        ("cache=bytes, PNG", png, {}),
        ("cache=none, folder of JPEG", root / "jpeg", streamed),
        (
            "cache=none, parquet of JPEG, interleaved",
            root / "parquet",
            {**streamed, "order": "interleave"},
        ),
    ):
        result[name, "0"] = partial(ours, source, 0, **changes)
        result[name, "2 threads"] = partial(ours, source, 2, **changes)
    for kind in ("uint8", "bytes"):
        result[f"packing a folder of JPEG, {kind}", f"{THREADS} threads"] = partial(packing, kind)
    for n in (0, 2):  # processes, kept from epoch to epoch: starting them is not counted
        usual = DataLoader(
            Files(root / "jpeg"), BATCH, True, num_workers=n, drop_last=True,
            persistent_workers=n > 0,
        )  # fmt: skip
        name = f"torch DataLoader, folder of JPEG{PILLOW}"
        result[name, "2 processes" if n else "0"] = partial(partial, read, usual)
    return result


def measure(root: Path) -> list[str]:
    """Times all ways in turns; returns the rows of the table."""
    compared = ways(root)
    rates: dict[tuple[str, str], list[float]] = {way: [] for way in compared}
    for turn in range(ROUNDS + 1):
        for way, prepare in compared.items():
            run, kept = prepare(), decode.simplejpeg
            decode.simplejpeg = None if way[0].endswith(PILLOW) else kept
            start = time.perf_counter()
            count = run()
            seconds = time.perf_counter() - start
            decode.simplejpeg = kept
            if turn:  # the first warms up
                rates[way].append(count / seconds)
    rows = ["| path | workers | images/s | min-max | images/s a core |", "|---|---|---|---|---|"]
    for (name, workers), values in rates.items():
        median = statistics.median(values)
        one = median / min(max(1, int(workers.split()[0])), CORES)
        spread = f"{min(values):,.0f}-{max(values):,.0f}"
        rows.append(f"| {name} | {workers} | {median:,.0f} | {spread} | {one:,.0f} |")
    return rows


def resident() -> int:
    """This process's resident memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def stream(folder: Path) -> None:
    """Streams an epoch, alone in its process; prints what its memory did, as JSON."""
    shares = {"train": 0.98, "val": 0.01, "test": 0.01}
    data = data_module(folder, 2, cache="none", order="interleave", memory=MEMORY, splits=shares)
    data.setup("fit")  # also refuses orders that need more than data.memory
    before, samples, done = resident(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            samples.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    count = read(data.train_dataloader())
    done.set()
    watcher.join()
    images = data.images["train"].images
    print(json.dumps([before, max(samples), count, images.reads, len(images.groups)]))


def memory(root: Path, encoded: list[bytes]) -> str:
    """Streams a set ten times larger than data.memory; returns what to say about it."""
    folder, size = root / "large", 0
    folder.mkdir()
    rng = np.random.default_rng(1)
    while size < TIMES * MEMORY * 2**30:
        images = [encoded[k] for k in rng.choice(IMAGES, 10 * ROWS, replace=False)]
        write_parquet(folder / f"part{size}.parquet", images)
        size += sum(len(image) for image in images)
    command = [sys.executable, __file__, "--stream", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, peak, count, reads, groups = json.loads(output.splitlines()[-1])
    size, before, growth = (x / 2**20 for x in (size, before, peak - before))
    return (
        f"Memory: while an epoch of {count:,} images, {size:,.0f} MiB of JPEG in parquet, was "
        f"streamed (interleaved, 2 threads) with data.memory={MEMORY}, {MEMORY * 1024:.0f} MiB, "
        f"the resident memory grew by at most {growth:.0f} MiB, from {before:.0f} MiB. The "
        f"bound holds row groups, reads, and batches of {BATCH * SIZE**2 * 3 / 2**20:.0f} MiB. "
        f"{groups} row groups were read {reads} times in all."
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        encoded = make_images(Path(directory))
        lines = measure(Path(directory))
        streamed = memory(Path(directory), encoded)
    kilobytes = sum(len(image) for image in encoded) / IMAGES / 1000
    packages = versions("Pillow", "simplejpeg", "pyarrow")
    text = "\n".join(lines) + (
        f"\n\nMedian of {ROUNDS} rounds; {IMAGES:,} JPEG images of {SIZE}x{SIZE}, quality 95 "
        f"where nothing else is said, {kilobytes:.0f} kB each ({PNGS} as PNG), batch {BATCH}, "
        f"shuffled unless interleaved, files in the page cache, batches left uint8. 0 workers: "
        f"the main thread alone.\n\n"
        f"{streamed}\n\n{cpu_name()}, {CORES} cores; torch {torch.__version__}, {packages}; "
        f"{date.today()}.\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.md").write_text(text)
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--stream"]:
        stream(Path(sys.argv[2]))
    else:
        main()
