"""Settings of all tests, and the commands as fixtures.

Its place also makes the helpers beside it (`gaussian`) importable.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

from diffusion_lab.command import cli

# Tensors are tiny here: threads that wait for each other on a busy machine cost up to 50 x.
torch.set_num_threads(1)

TINY = [  # a training that takes a second
    "network=unet_tiny",
    "data.size=16",
    "data.splits={train: 64, val: 16, test: 16}",
    "data.batch_size=8",
    "samples.num_samples=4",
    "sampler.steps=2",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "lr_schedule.warmup=0",
]


@dataclass(frozen=True)
class Result:
    """Result of a command: its exit code and output."""

    code: int
    text: str


Command = Callable[..., Result]


@pytest.fixture
def lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Command]:
    """Runs train.py or eval.py in this process, in an empty directory: lab("train", "seed=1").

    In a separate process each command would spend five seconds on imports.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LAB_CACHE", str(tmp_path / "cache"))

    def run(command: str, *overrides: str) -> Result:
        function = {"train": cli.train, "eval": cli.evaluate}[command]
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *overrides])
        code = 0
        try:
            function()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out + err)

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield run
    # Hydra's write to a stream that is closed by the time of the next test.
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size, disk("64m"), or gives it another; returns its folder."""
    path = tmp_path / "disk"

    def mount(size: str) -> Path:
        again = path.exists()
        path.mkdir(exist_ok=True)
        options = f"remount,size={size}" if again else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            path.rmdir()
            pytest.skip("mounting a small file system needs more rights")
        return path

    yield mount
    if path.exists():
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def tiny(lab: Command) -> Callable[..., Result]:
    """Trains a tiny run, or resumes one: tiny("trainer.max_steps=3", "hydra.run.dir=a")."""

    def run(*overrides: str) -> Result:
        resumed = any(text.startswith("resume=") for text in overrides)
        flags = [text for text in overrides if text.startswith("-")]  # they come first
        rest = [text for text in overrides if text not in flags]
        return lab("train", *flags, *([] if resumed else TINY), *rest)

    return run


@pytest.fixture
def run(tiny: Callable[..., Result]) -> Path:
    """A tiny run under outputs/train of an empty directory."""
    result = tiny("trainer.max_steps=3")
    assert result.code == 0, result.text
    return next(Path("outputs/train").rglob("finished.json")).parent
