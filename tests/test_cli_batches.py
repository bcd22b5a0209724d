"""Batch sizes and precision of evaluation commands."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from test_cli_eval import SMALL, table
from torch import Tensor

from diffusion_lab import runs
from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.guidance import DPS, MMPS, TMPD, PiGDM, TruncatedReverseSDE
from diffusion_lab.task.base import Task

FOUR = [*SMALL, "num_samples=4", "num_images=3", "sampler.steps=2"]


class Batches:
    """Records batch sizes, and simulates a device whose memory holds `limit` images."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.limit = 1000

    def outputs(self, denoiser: NetworkDenoiser, x_t: Tensor, t: Tensor) -> tuple:
        self.sizes.append(len(x_t))
        if len(x_t) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")
        return OUTPUTS(denoiser, x_t, t)


OUTPUTS = NetworkDenoiser.outputs


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Batches]:
    found = Batches()
    monkeypatch.setattr(
        NetworkDenoiser, "outputs", lambda denoiser, x_t, t: found.outputs(denoiser, x_t, t)
    )
    return found


METHODS = {
    "denoise": (TruncatedReverseSDE(), 0), "inpaint_box": (MMPS(), 4), "deblur": (PiGDM(), 1),
    "super_resolution": (TMPD(), 2), "hdr": (DPS(), 1),
}  # fmt: skip


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=() if task in ("denoise", "inpaint_box") else pytest.mark.slow)
        for task in METHODS
    ],
)
def test_all_samples_are_one_batch_and_gradients_need_no_extra_call(
    lab: Command, run: Path, batches: Batches, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 2 steps calls the network once for 3 x 4 samples; gradients add no calls."""
    guidance, count = METHODS[task]
    backward: list[Tensor] = []
    grad = torch.autograd.grad

    def counted(outputs: Tensor, inputs: Tensor, *rest: object, **options: object) -> tuple:
        if isinstance(inputs, Tensor):  # a list belongs to the backward pass of attention
            backward.append(inputs)
        return grad(outputs, inputs, *rest, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    option = type(guidance).__name__.lower().removesuffix("reversesde")
    result = lab("eval", f"task={task}", f"guidance={option}", *FOUR)
    assert result.code == 0, result.text
    # Further calls: E[x_0 | y] with one row per noisy image, and the Stein discrepancy.
    once = [3] if task == "denoise" else []
    assert batches.sizes == [12, 12, *once, 12]
    assert len(backward) == 2 * count + (task != "denoise")


def test_samples_above_the_batch_size_are_processed_in_parts(
    lab: Command, run: Path, batches: Batches
) -> None:
    result = lab("eval", "task=inpaint_box", "batch_size=3", *FOUR)
    assert result.code == 0, result.text
    assert batches.sizes == 3 * [3, 3, 1, 1, 3, 1]  # two steps per part, Stein discrepancy


def test_auto_batch_size_fits_the_memory_and_gives_the_same_results(
    lab: Command, run: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[int] = []
    kept = Task.test_step

    def test_step(task: Task, index: Tensor, batch_idx: int) -> None:
        files.append(len(index))
        kept(task, index, batch_idx)

    monkeypatch.setattr(Task, "test_step", test_step)
    assert lab("eval", "batch_size=2", "hydra.run.dir=two", *SMALL).code == 0
    assert set(batches.sizes) == {1, 2} and files == [1] * 5
    batches.limit, files[:] = 2, []
    result = lab("eval", "batch_size=auto", "hydra.run.dir=auto", *SMALL)
    assert result.code == 0, result.text
    assert files == [5]  # the number of images per file does not change
    assert result.text.count("batch_size=auto: the device's memory holds 2 at once") == 1
    assert Path("auto/results.csv").read_text() == Path("two/results.csv").read_text()


def test_out_of_memory_error_suggests_settings(lab: Command, run: Path, batches: Batches) -> None:
    batches.limit = 2
    result = lab("eval", "batch_size=4", *SMALL)
    assert result.code == 1 and "does not hold batch_size=4 (CUDA out of memory" in result.text
    assert "set batch_size=auto or below 4" in result.text and "Traceback" not in result.text
    batches.limit = 0
    result = lab("eval", "batch_size=auto", *SMALL)
    assert result.code == 1 and "batch_size=1" in result.text and "bfloat16" in result.text


def test_bfloat16_is_reported_and_changes_results_slightly(lab: Command, run: Path) -> None:
    assert lab("eval", "sigma_t=0.2", "hydra.run.dir=a", *SMALL).code == 0
    reduced = lab("eval", "sigma_t=0.2", "precision=bfloat16", "hydra.run.dir=b", *SMALL)
    assert reduced.code == 0, reduced.text
    a, b = (table(name) for name in "ab")
    assert a["noisy", "psnr"] == b["noisy", "psnr"]
    for estimate in ("mmse", "sample"):
        assert 0 < abs(a[estimate, "psnr"][0] - b[estimate, "psnr"][0]) < 0.1
    assert "averaged weights, in bfloat16" in Path("b/report.html").read_text()
    assert "in bfloat16" not in Path("a/report.html").read_text()


def test_trainer_precision_does_not_change_the_results(lab: Command, run: Path) -> None:
    """Operators run in float32, not under the autocast of trainer.precision."""
    for name, extra in (("a", []), ("b", ["trainer.precision=bf16-mixed"])):
        result = lab("eval", "task=super_resolution", f"hydra.run.dir={name}", *SMALL, *extra)
        assert result.code == 0, result.text
    assert Path("a/results.csv").read_text() == Path("b/results.csv").read_text()


@pytest.mark.parametrize("key", ["precision=bfloat16", "compile=true"])
def test_precision_and_compile_are_errors_for_other_networks(
    lab: Command, run: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = runs.rebuild

    def other(*arguments: Any) -> runs.Run:
        found = rebuild(*arguments)
        found.denoiser.network = torch.nn.Linear(2, 2)
        return found

    monkeypatch.setattr(runs, "rebuild", other)
    result = lab("eval", key, *SMALL)
    assert result.code == 1 and f"{key} applies to the blocks of a UNet" in result.text
    assert "is a Linear" in result.text and "Traceback" not in result.text
