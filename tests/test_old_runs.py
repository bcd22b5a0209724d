"""Compatibility with a run of version 0.1, before modules and keys were renamed.

`fixtures/run_0_1` was written by `python train.py` at that version, with `data.tail` and
`data.lanes` among its overrides. `expected.pt` holds E[x_0 | x_t] of its averaged network at three
times, computed at that version.
"""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command, Result

from diffusion_lab import load_run
from diffusion_lab.runs import load_checkpoint

RUN = Path(__file__).parent / "fixtures" / "run_0_1"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Returns a writable copy of the run."""
    copy = tmp_path / "old"
    shutil.copytree(RUN, copy)
    return copy


def test_denoiser_of_an_old_run_returns_the_same_values() -> None:
    expected = torch.load(RUN / "expected.pt", weights_only=True)
    denoiser = load_run(RUN)
    for t, denoised in expected["denoised"].items():
        actual = denoiser(expected["x_t"], torch.tensor(float(t), dtype=torch.float64))
        torch.testing.assert_close(actual, denoised, rtol=1e-4, atol=1e-5)


def test_checkpoint_of_an_old_run_has_the_old_names() -> None:
    """The other tests of this file rely on the old names."""
    saved = load_checkpoint(RUN / "checkpoints" / "last.ckpt")["diffusion_lab"]["config"]
    assert saved["time"]["_target_"] == "diffusion_lab.time.Uniform"
    assert saved["lr_schedule"]["_target_"] == "diffusion_lab.lr_schedule.Cosine"
    assert saved["data"]["lanes"] == 4 and saved["data"]["tail"] == "drop"


def test_old_run_can_be_resumed(old_run: Path, lab: Command) -> None:
    result = lab("train", f"resume={old_run}", "trainer.max_steps=8")
    assert result.code == 0, result.text
    checkpoint = load_checkpoint(old_run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 8
    with open(old_run / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps) and steps[-1] == 7  # numbered from 0


def test_old_run_can_be_evaluated(old_run: Path, lab: Command) -> None:
    small = ["num_images=2", "num_samples=2", "sampler.steps=2", "trainer.accelerator=cpu"]
    result = lab("eval", f"run={old_run}", "task=denoise", "hydra.run.dir=e", *small)
    assert result.code == 0, result.text
    assert Path("e/results.csv").exists()


def test_resume_of_an_old_run_with_another_model_is_refused(
    old_run: Path, tiny: Callable[..., Result]
) -> None:
    result = tiny(f"resume={old_run}", "schedule=linear", "trainer.max_steps=8")
    assert result.code == 1 and "schedule._target_" in result.text
