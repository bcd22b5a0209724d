"""Settings of all tests, and fixtures that run the commands.

Since this file is in tests/, pytest also makes the helper modules there importable.
"""

import gc
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crash_injection
import pytest
import torch
from hydra.errors import HydraException

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start

from hydra._internal.hydra import Hydra

from diffusion_lab.command import cli
from diffusion_lab.command.validation import check_eval, check_train
from diffusion_lab.errors import ConfigError
from diffusion_lab.runs import compose
from diffusion_lab.runs.signature import sign

# Tensors are tiny; on a busy machine, several threads are up to 50 times slower than one.
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


def pytest_collection_finish() -> None:
    """Excludes imported objects from garbage collection, which otherwise takes 5% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@dataclass(frozen=True)
class Result:
    """Result of a command: its exit code and output."""

    code: int
    text: str


Command = Callable[..., Result]
Trained = Callable[..., Path]
Whole = Callable[..., Path]


@contextmanager
def restored_logging() -> Iterator[None]:
    """Removes the handlers that Hydra adds, since they write to a stream of one test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def run_command(command: str, *overrides: str) -> int:
    """Runs train.py or eval.py in this process; returns its exit code."""
    function = {"train": cli.train, "eval": cli.evaluate}[command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{command}.py", *overrides])
        # Hydra composes everything a second time to read hydra.mode, which conf/ does not set.
        if not any(text.startswith(("hydra.mode", "--config")) for text in overrides):
            patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        try:
            function()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def find_refusal(command: str, *overrides: str) -> str:
    """Returns the error of a configuration that is refused before data or a run is opened."""
    with pytest.raises((ConfigError, HydraException)) as error:
        check = {"train": check_train, "eval": check_eval}[command]
        check(compose(command, [*overrides, "++paths.output_dir=out"]))
    return str(error.value)


@pytest.fixture(scope="session", autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the key of signatures in a temporary directory, also for processes of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


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
        capfd.readouterr()
        code = run_command(command, *overrides)
        out, err = capfd.readouterr()
        return Result(code, out + err)

    with restored_logging():
        yield run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts or resizes a small file system and returns its folder: disk("64m")."""
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
        flags = [text for text in overrides if text.startswith("-")]  # flags precede overrides
        rest = [text for text in overrides if text not in flags]
        return lab("train", *flags, *([] if resumed else TINY), *rest)

    return run


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a tiny run once per process for each list of overrides; returns its directory.

    The packed data is beside it, in `cache`. Both are read only: tests use copies.
    """
    made: dict[tuple[str, ...], Path] = {}

    def train(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("training")
            with pytest.MonkeyPatch.context() as patch, restored_logging():
                patch.chdir(folder)
                patch.setenv("DIFFUSION_LAB_CACHE", str(folder / "cache"))
                assert run_command("train", *TINY, *overrides, "hydra.run.dir=run") == 0
            made[overrides] = folder / "run"
        return made[overrides]

    return train


def replace_text(value: Any, old: str, new: str) -> Any:
    """Returns nested containers with a text replaced in all strings."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        items = ((replace_text(k, old, new), replace_text(v, old, new)) for k, v in value.items())
        return type(value)(items)
    if isinstance(value, list | tuple):
        return type(value)(replace_text(each, old, new) for each in value)
    return value


@pytest.fixture
def trained(lab: Command, tmp_path: Path, trainings: Callable[..., Path]) -> Callable[..., Path]:
    """Copies a finished tiny run into the empty directory: trained("a", "trainer.max_steps=2").

    It is equal to the one that tiny(*overrides, "hydra.run.dir=a") would train.
    """

    def copy(directory: str, *overrides: str) -> Path:
        source = trainings(*overrides)
        shutil.copytree(source, directory)
        shutil.copytree(source.parent / "cache", tmp_path / "cache", dirs_exist_ok=True)
        old, new = str(source), str(tmp_path / directory)
        for path in Path(directory).rglob("*"):  # absolute paths in settings, logs and checkpoints
            if path.suffix in (".yaml", ".log", ".html"):
                path.write_text(path.read_text().replace(old, new))
            elif path.suffix == ".ckpt":
                content = replace_text(torch.load(path, weights_only=True), old, new)
                content["diffusion_lab"]["signature"] = sign(content["diffusion_lab"]["config"])
                torch.save(content, path)
        return Path(directory)

    return copy


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Trains without interruption in a separate process, once for each list of overrides.

    Returns the working directory, which also has the records of `crash_injection`.
    """
    made: dict[tuple[str, ...], Path] = {}

    def train(*overrides: str) -> Path:
        if overrides not in made:
            directory = tmp_path_factory.mktemp("whole") / "whole"
            code = crash_injection.train("", directory, *overrides)
            assert code == 0, (directory / crash_injection.TEXT).read_text()
            made[overrides] = directory
        return made[overrides]

    return train


@pytest.fixture
def run(trained: Trained) -> Path:
    """A tiny run under outputs/train of an empty directory."""
    return trained("outputs/train/ddpm_faces/2026-01-01_00-00-00", "trainer.max_steps=3")
