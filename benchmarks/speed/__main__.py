"""Speed and memory compared with diffusers and torchvision: `make bench`, 25 minutes on two cores.

    python -m benchmarks.speed [--only train/256 sample/256] [--minutes 24] [--quick]

Writes benchmarks/results/latest.json and speed.md, docs/speed.md and the README's table. --only
takes prefixes of row names and keeps all other rows. --quick runs everything once with a tiny
network and writes nothing. A GPU is used if there is one, unless --device cpu is given.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import RESULTS, ROOT, cpu_name, versions, write_block
from benchmarks.speed import contestants, report
from benchmarks.speed.alternate import OutOfMemory, Worker, Workload, time_alternately
from benchmarks.speed.contestants import SETTINGS, STEPS
from benchmarks.speed.report import Row
from diffusion_lab.interop.diffusers import save_unet
from diffusion_lab.nn.unet import emulates_bfloat16

EAGER = ["diffusers contiguous", "diffusers channels_last"]
OTHER = "denoising-diffusion-pytorch"
ROUNDS, QUICK_ROUNDS = 40, 1
PACKAGES = ("torch", "torchvision", "diffusers", "lightning", "simplejpeg", "Pillow")
TARGETS = {"train/256/bf16": 300.0, "sample/256/bf16": 900.0}  # images/s, network calls x images/s
METHOD = f"""Both sides have the same weights, inputs, batch, type and number of threads. Each is a
process of its own, and they run alternately for about half a second each: values are medians over
up to {ROUNDS} rounds, the ratio is the median of the rounds' ratios, above 1 if ours is better,
and the spread its interquartile range over the median.

- *train*: forward, backward, fused Adam; bf16 by autocast. A processor that only emulates bfloat16
  has no bf16 rows: there our network runs in float32.
- *sample*: one of {STEPS} steps of DDPM's sampler for a whole batch, the peer by its DDPMPipeline;
  bf16 by the weights' type.
- *guided*: E[x₀ given x_t] and a product with its Jacobian.
- *memory*: the peak memory of a training step above that of the process before it.
- *loader*: JPEG files of 256x256, decoded, mirrored, in [-1, 1] on the device, by as many threads
  as the peer (ImageFolder, Resize, RandomHorizontalFlip, ToTensor, Normalize) has processes.
- *framework*: a step of `python train.py` against a loop with the same network, loss, optimizer
  and averaged weights and nothing else.
- *features*: those of EfficientNet-Lite0, as the Fréchet distance takes them.
- *peak*: a 3x3 convolution and a matrix product; the faster one is the peak.

*diffusers eager* is in the faster of its two memory layouts, *diffusers compiled* is torch.compile
of the channels_last network, and compared with ours with compile=true, which has no effect on a
CPU that convolutions are compiled for anyway; sampling on a GPU, both are CUDA graphs (mode
reduce-overhead, cuda_graphs=true). FLOP are those of the published network; a training step counts
three forward passes. Winograd's algorithm needs fewer operations than are counted; a share of the
peak above 100% would mean nothing and is not shown."""
SECONDS = {"cpu": 60.0, "cuda": 25.0}  # of all rounds; other processes disturb a CPU more
NEED = {"loader": 120, "framework": 150, "features": 90}  # seconds, on two cores


class Bench:
    """Runs the measurements and collects their rows.

    Arguments:
        device: "cpu" or "cuda".
        threads: Threads of an operator.
        folder: For weights, files and runs.
        only: Prefixes of the names of the rows to be measured; empty for all.
        minutes: Time limit after which no further measurement starts.
        quick: Whether to use a tiny network and a single round.
    """

    def __init__(
        self, device: str, threads: int, folder: Path, only: Sequence[str] = (),
        minutes: float = 25, quick: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.threads, self.folder, self.only = device, threads, folder, tuple(only)
        self.quick, self.rows, self.skipped = quick, [], []
        self.deadline = time.perf_counter() + 60 * minutes
        self.name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        processor = f"{cpu_name()}, {threads} threads"
        self.machine = f"{processor}; {versions(*PACKAGES)}; {date.today()}"
        self.peaks: dict[str, float] = {}  # FLOP/s by type
        self.emulated = device == "cpu" and emulates_bfloat16()

    def should_run(self, name: str, seconds: float) -> bool:
        """Whether a measurement is selected and there is time for it."""
        if self.only and not any(name.startswith(each) for each in self.only):
            return False
        if time.perf_counter() + seconds > self.deadline:
            self.skipped.append(name)
            return False
        print(f"{name} ...", flush=True)
        return True

    def measure(
        self, make: Callable[..., Workload | None], names: Sequence[str],
        arguments: Mapping[str, Any], rounds: int = ROUNDS, seconds: float | None = None,
        steps: int | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:  # fmt: skip
        """Returns the seconds per step in each round and the facts of each side, by its name.

        A peer that runs out of memory is dropped.

        Raises:
            OutOfMemory: If ours runs out of memory.
        """
        workers = {}
        for name in names:
            keeps_memory = name.startswith("ours") or make == contestants.framework
            arguments = {**arguments, "side": name}
            workers[name] = Worker(make, self.threads, self.device, keeps_memory, arguments)
        try:
            facts = {}
            if self.device == "cpu":
                for worker in workers.values():  # all prepare in parallel
                    worker.prepare()
            for name, worker in list(workers.items()):
                try:
                    if self.device == "cuda":  # there is memory for one at a time
                        worker.prepare()
                    facts[name] = worker.facts()
                except OutOfMemory:
                    if name.startswith("ours"):
                        raise
                    workers.pop(name).close()
            if self.quick:
                rounds, steps = QUICK_ROUNDS, 1
            return time_alternately(workers, rounds, seconds or SECONDS[self.device], steps), facts
        finally:
            for worker in workers.values():
                worker.close()

    def add(self, name: str, unit: str, ours: Sequence[float], peer: Sequence[float],
            peer_name: str, **more: Any) -> None:  # fmt: skip
        row = report.row(
            name, self.name, unit, ours, peer, peer_name, machine=self.machine, **more
        )  # fmt: skip
        self.rows.append(row)
        print(report.table([row]).splitlines()[-1], flush=True)

    def weights(self, config: str) -> Path:
        """The folder of a setting's weights, in diffusers' format."""
        folder = self.folder / f"weights-{config}"
        if not folder.exists():
            save_unet(contestants.make_network(SETTINGS[config]), folder)
        return folder

    def peak(self, dtype: str) -> None:
        """Measures the peak floating-point rate."""
        if dtype in self.peaks:
            return
        worker = Worker(contestants.peak, self.threads, self.device, False, {"dtype": dtype})
        try:
            worker.prepare()
            facts = worker.facts()
        finally:
            worker.close()
        self.peaks[dtype] = 1 / min(min(facts["conv"]), min(facts["matmul"]))
        self.add(f"peak/{dtype}", "GFLOP/s", facts["conv"], facts["matmul"], "matmul")

    def network(
        self, kind: str, config: str, dtype: str, compiled: bool = False, need: float = 120,
        seconds: float | None = None, steps: int | None = None,
    ) -> None:  # fmt: skip
        """Adds the rows of a training, sampling or guided step.

        A CPU that only emulates bfloat16 gets no bf16 row: our network runs in float32 there, so
        that the two sides would not compute the same.

        Arguments:
            kind: "train", "sample" or "guided".
            config: A key of SETTINGS.
            dtype: "float32" or "bf16".
            compiled: Whether the compiled sides take part.
            need: Expected duration in seconds on two cores, with preparation.
            seconds: Time limit after which no further round starts; None for that of the device.
            steps: Steps per round; None measures how many.
        """
        name, setting = f"{kind}/{config}/{dtype}", SETTINGS[config]
        if dtype == "bf16" and self.emulated:
            return
        if not self.should_run(name, need):
            return
        if kind != "guided":
            self.peak(dtype)
        names = ["ours", *EAGER]
        if compiled and not self.quick:
            names += ["ours compiled", "diffusers compiled"]
        if kind == "train" and contestants.has_denoising_diffusion_pytorch():
            names.append(OTHER)
        batch, notes = setting.batch[self.device], []
        while True:
            arguments = {"setting": setting, "folder": self.weights(config), "batch": batch}
            if kind != "guided":
                arguments["dtype"] = dtype
            try:
                times, facts = self.measure(
                    getattr(contestants, kind), names, arguments, ROUNDS, seconds, steps
                )
            except OutOfMemory:
                notes = [f"out of memory at batch {batch}"]
            else:
                each = {"train": batch, "sample": STEPS, "guided": 1}[kind]
                costs = {side: [t / each for t in values] for side, values in times.items()}
                self._targets(name, kind, batch, costs)
                if any(not side.startswith("ours") for side in costs):
                    break
                alone = f"{1e3 * median(costs['ours']):.3g} ms"
                if kind == "train":
                    alone += f" an image and {median(facts['ours']['memory']) / 1e6:,.0f} MB"
                notes = [f"batch {batch}: the peer is out of memory, ours takes {alone}"]
            if batch == 1:
                return
            batch //= 2
        self._compare(name, dtype, batch, costs, facts, notes)

    def _targets(
        self, name: str, kind: str, batch: int, costs: Mapping[str, Sequence[float]]
    ) -> None:
        """Prints the rate beside the target for a large GPU."""
        if name in TARGETS and self.device == "cuda":
            side = min((s for s in costs if s.startswith("ours")), key=lambda s: median(costs[s]))
            rate = (batch if kind == "sample" else 1) / median(costs[side])
            print(f"{name}: {rate:.0f} of {TARGETS[name]:.0f} a second ({side}, batch {batch})")

    def _compare(
        self, name: str, dtype: str, batch: int, costs: Mapping[str, Sequence[float]],
        facts: Mapping[str, Mapping[str, Any]], notes: Sequence[str],
    ) -> None:  # fmt: skip
        """Makes the rows of a network: ours eager against eager, compiled against compiled."""
        kind, config, _ = name.split("/")
        unit = "images/s" if kind == "train" else "ms"
        peak = self.peaks.get(dtype)
        forwards = {"train": 3, "sample": batch, "guided": 0}[kind]
        flops = forwards * facts.get(EAGER[0], {}).get("flops", 0)

        def add(ours: str, peer: str, peer_name: str, *more: str) -> None:
            note = "; ".join([*notes, *more])
            self.add(
                name, unit, costs[ours], costs[peer], peer_name, flops=flops, peak=peak,
                batch=batch, note=note,
            )  # fmt: skip
            memory = [facts[side].get("memory") for side in (ours, peer)]
            if all(memory):
                held = f"memory/{config}/{dtype}"
                self.add(held, "MB", *memory, peer_name, batch=batch, note=note)

        eager = [side for side in EAGER if side in costs]
        if eager:
            best = min(eager, key=lambda side: median(costs[side]))
            add("ours", best, "diffusers eager", best.removeprefix("diffusers "))
        if "diffusers compiled" in costs:
            pairs = zip(costs["diffusers compiled"], costs["ours"], strict=True)
            plain = median([theirs / mine for theirs, mine in pairs])
            more = f"ours with compile=true; without it: {plain:.2f}"
            add("ours compiled", "diffusers compiled", "diffusers compiled", more)
        if OTHER in costs:
            count, own = facts[OTHER]["parameters"], facts[OTHER]["flops"] / 1e9
            add("ours", OTHER, OTHER, f"{count:,} parameters, {own:.3g} GFLOP an image")

    def _rates(
        self, make: Callable[..., Workload | None], peer: str, arguments: Mapping[str, Any],
        images: float, **how: Any,
    ) -> tuple[list[float], ...]:  # fmt: skip
        """Returns the seconds per image of ours and of a peer, for steps of `images` images."""
        times, _ = self.measure(make, ["ours", peer], arguments, **how)
        return tuple([t / images for t in times[side]] for side in ("ours", peer))

    def loader(self) -> None:
        if not self.should_run("loader/jpeg", NEED["loader"]):
            return
        photos = self.folder / "photos"
        count = contestants.make_photos(photos, *([16] if self.quick else []))
        workers = self.threads
        arguments = {"folder": photos, "cache": self.folder / "cache", "workers": workers}
        whole = count // contestants.JPEG_BATCH * contestants.JPEG_BATCH / workers  # images a core
        times = self._rates(contestants.loader, "torchvision", arguments, whole, steps=1)
        self.add(
            "loader/jpeg", "images/s a core", *times, "torchvision ImageFolder",
            note=f"{workers} workers on as many cores",
        )  # fmt: skip

    def features(self) -> None:
        if not self.should_run("features/efficientnet", NEED["features"]):
            return
        batch = 8 if self.quick else 64
        times = self._rates(contestants.features, "network", {"batch": batch}, batch, steps=1)
        self.add(
            "features/efficientnet", "images/s", *times, "the network on the whole batch",
            note=f"batch {batch}",
        )  # fmt: skip

    def framework(self) -> None:
        if not self.should_run("framework/faces", NEED["framework"]):
            return
        accelerator = "gpu" if self.device == "cuda" else "cpu"
        overrides = [f"trainer.accelerator={accelerator}"]
        if self.quick:
            overrides += ["network=unet_tiny", "data.batch_size=2"]
        arguments = {"folder": self.folder / "run", "overrides": overrides}
        batch = 2 if self.quick else 16
        times = self._rates(
            contestants.framework, "bare loop", arguments, batch, rounds=2 * ROUNDS, seconds=100
        )
        self.add("framework/faces", "images/s", *times, "bare loop", note="at least 0.97")

    def run_all(self) -> list[Row]:
        """Runs all measurements, the most important first; returns the rows."""
        if self.quick:
            for kind in ("train", "sample", "guided"):
                self.network(kind, "tiny", "float32")
        elif self.device == "cuda":
            for config, dtype in (("256", "bf16"), ("64", "bf16"), ("faces", "bf16"),
                                  ("64", "float32"), ("faces", "float32")):  # fmt: skip
                self.network("train", config, dtype, compiled=True)
                self.network("sample", config, dtype, compiled=True)
            for config in ("faces", "64"):
                self.network("guided", config, "float32")
        else:
            self.network("train", "faces", "float32", compiled=True, need=420, seconds=180)
            self.network("train", "64", "float32", need=200, seconds=110)
            self.network("sample", "faces", "float32")
            self.network("sample", "64", "float32", need=180, seconds=90, steps=1)
            self.network("guided", "faces", "float32")
            self.network("guided", "64", "float32", need=120)
            for config in ("faces", "64"):
                self.network("train", config, "bf16")
                self.network("sample", config, "bf16")
        self.framework()
        self.loader()
        self.features()
        return self.rows


def main(arguments: Sequence[str] | None = None) -> None:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=())
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            given.device, given.threads, Path(folder), given.only, given.minutes, given.quick
        )
        rows = bench.run_all()
    if bench.skipped:
        print(f"skipped for lack of time: {', '.join(bench.skipped)}; raise --minutes")
    if not given.quick and rows:
        write(rows, everything=not given.only)


def write(rows: Sequence[Row], everything: bool, results: Path = RESULTS) -> None:
    """Merges the rows with those of earlier measurements and writes all tables."""
    path = results / "latest.json"
    old = json.loads(path.read_text()) if path.exists() else []
    merged = report.merge(old, rows, everything)
    path.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    (results / "speed.md").write_text(report.report(merged, METHOD))
    write_block("speed", report.page(merged), ROOT / "docs" / "speed.md")
    write_block("speed", report.summary(merged))


if __name__ == "__main__":
    main()
