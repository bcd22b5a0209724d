"""Signals of a cluster: the state is saved, and the run can be resumed elsewhere."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Whole
from crash_injection import TEXT, seen, train
from test_killed import RUN, metrics, state

from diffusion_lab.runs import load_checkpoint

SCRIPT = Path(__file__).parent / "crash_injection.py"


# Steps 5, 10, ... are followed by a validation, whose checkpoint is that of the next step.
@pytest.mark.parametrize(
    ("cue", "step"),
    [
        ("step:8:SIGTERM", 8),
        *(
            pytest.param(cue, step, marks=pytest.mark.slow)
            for cue, step in (
                ("validation:2:SIGTERM", 6), ("written:1:SIGUSR1", 4), ("step:7:SIGTERM", 7),
                ("step:7:SIGUSR1", 7), ("stepped:9:SIGTERM", 9),
            )
        ),
    ],
)  # fmt: skip
def test_a_signal_saves_the_step_and_ends_cleanly(
    cue: str, step: int, whole: Whole, tmp_path: Path
) -> None:
    directory, uninterrupted = tmp_path / "stopped", whole(*RUN)
    assert train(cue, directory, *RUN) == 0
    run, text = directory / "run", (directory / TEXT).read_text()
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == step
    assert not (run / "finished.json").exists()
    assert f"stopped by {cue.split(':')[2]} after step {step}; continue with" in text
    assert "resume=" in text and "Traceback" not in text
    assert train("", directory, "resume=run") == 0, (directory / TEXT).read_text()
    actual, target = state(run), state(uninterrupted / "run")
    assert all(torch.equal(actual[name], value) for name, value in target.items())
    assert seen(directory) == seen(uninterrupted)
    assert metrics(run) == metrics(uninterrupted / "run")


@pytest.mark.slow
def test_a_signal_in_a_validation_whose_step_is_saved_does_not_wait(tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    overrides = [*RUN, "checkpoint.every_n_steps=5"]
    assert train("validation:1:SIGTERM", directory, *overrides) == 0
    run = directory / "run"
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert not any("val/loss" in row for row in metrics(run))
    assert train("", directory, "resume=run") == 0
    assert [row["step"] for row in metrics(run) if "val/loss" in row] == [
        "4", "9", "14", "19", "20"
    ]  # fmt: skip


def test_a_signal_ends_a_sweep(tmp_path: Path) -> None:
    directory = tmp_path / "swept"
    overrides = [text for text in RUN if not text.startswith("hydra.run.dir")]
    code = train(
        "step:4:SIGTERM", directory, "-m", *overrides, "hydra.sweep.dir=sweep", "seed=0,1"
    )
    assert code == 0, (directory / TEXT).read_text()
    assert (directory / "sweep" / "0" / "checkpoints" / "last.ckpt").exists()
    assert not (directory / "sweep" / "1").exists()


@pytest.mark.slow
def test_two_devices_stop_at_the_same_step(tmp_path: Path) -> None:
    """The signal reaches one process; it arrives between two steps that are logged."""
    rest = [text for text in TINY if not text.startswith(("trainer.", "data.batch_size"))]
    command = [
        sys.executable, str(SCRIPT), *rest, "trainer=ddp_sim", "data.batch_size=4",
        "trainer.log_every_n_steps=4", "trainer.max_steps=100000", "hydra.run.dir=run",
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DIFFUSION_LAB_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    with open(tmp_path / TEXT, "w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not (tmp_path / "seen-1.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    text = (tmp_path / TEXT).read_text()
    assert code == 0, text
    step = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"]
    assert step > 0 and step % 4 == 0
    assert f"stopped by SIGTERM after step {step}" in text
    places = seen(tmp_path)
    assert max(b + 8 * e for r, e, b in places if r == 0) == step - 1
    assert max(b + 8 * e for r, e, b in places if r == 1) == step - 1
