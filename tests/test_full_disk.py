"""Full disk: a clear error, and earlier files stay intact."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from crash_injection import TEXT, seen, train
from test_interrupted import RUN, metrics, state

from diffusion_lab.runs import load_checkpoint


def fill(path: Path, leave: int) -> Path:
    """Fills the disk except for `leave` bytes; returns the file that occupies it."""
    ballast = path / "ballast"
    with open(ballast, "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    with open(ballast, "r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave))
    return ballast


# The first write that fails is a checkpoint, or, if none is due, a row of metrics.csv.
CASES = {
    "at a checkpoint": (150_000, [], "cannot write the checkpoint"),
    "at logging": (
        48_000,
        [
            "trainer.max_steps=400",
            "trainer.val_check_interval=500",
            "checkpoint.every_n_steps=500",
        ],
        "training stopped",
    ),
}


@pytest.mark.slow  # test_cli_train.py has a fast one
@pytest.mark.parametrize("case", CASES)
def test_run_can_be_resumed_after_a_full_disk(
    case: str, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    """The run directory is on a small disk, which is filled after the first checkpoint."""
    leave, more, what = CASES[case]
    small = disk("64m")
    directory, run = tmp_path / "work", small / "run"
    overrides = [f"hydra.run.dir={run}" if t.startswith("hydra.run") else t for t in RUN]
    overrides += ["samples.every_n_steps=1000", "lr_schedule=constant", "lr_schedule.warmup=0"]
    assert train("step:4", directory, *overrides) == -9
    checkpoint = run / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    assert load_checkpoint(checkpoint)["global_step"] == 3
    ballast = fill(small, leave)
    code, text = train("", directory, f"resume={run}", *more), (directory / TEXT).read_text()
    assert code == 1, text
    assert what in text and "No space left" in text and f"resume={run}" in text
    assert "Traceback" not in text
    assert checkpoint.read_bytes() == before
    assert not list(run.rglob("*.partial"))
    ballast.unlink()
    for path in directory.glob("seen-*"):  # the stopped run may be ahead of its checkpoint
        path.unlink()
    assert train("", directory, f"resume={run}") == 0, (directory / TEXT).read_text()
    whole = tmp_path / "whole"
    assert train("", whole, *[t for t in overrides if str(run) not in t], "hydra.run.dir=run") == 0
    actual, target = state(run), state(whole / "run")
    assert all(torch.equal(actual[name], value) for name, value in target.items())
    assert seen(directory).items() <= seen(whole).items()
    assert metrics(run) == metrics(whole / "run")


@pytest.mark.slow
def test_full_disk_during_packing_is_named(disk: Callable[[str], Path], tmp_path: Path) -> None:
    directory, small = tmp_path / "work", disk("64m")
    overrides = [*TINY, f"data.cache_dir={small}/cache", "trainer.max_steps=1", "hydra.run.dir=a"]
    ballast = fill(small, 40_000)  # 96 images of 768 bytes do not fit
    code, text = train("", directory, *overrides), (directory / TEXT).read_text()
    assert code == 1, text
    assert f"data.cache_dir={small}/cache" in text and "No space left" in text
    assert "Traceback" not in text and not (directory / "a" / "checkpoints").exists()
    ballast.unlink()
    assert train("", directory, *overrides) == 0, (directory / TEXT).read_text()
