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
    """The sizes of the batches of a command, which a memory of `limit` images may have."""

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
def test_the_samples_of_all_images_are_one_batch_and_a_derivative_no_new_call(
    lab: Command, run: Path, batches: Batches, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 images of 4 samples, in 2 steps: a call a step, however many backward passes it has."""
    guidance, count = METHODS[task]
    backward: list[Tensor] = []
    grad = torch.autograd.grad

    def counted(outputs: Tensor, inputs: Tensor, *rest: object, **options: object) -> tuple:
        backward.append(inputs)
        return grad(outputs, inputs, *rest, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    option = type(guidance).__name__.lower().removesuffix("reversesde")
    result = lab("eval", f"task={task}", f"guidance={option}", *FOUR)
    assert result.code == 0, result.text
    # Beside them E[x_0 | y] of a noisy image, of one row for each, and the Stein discrepancy.
    once = [3] if task == "denoise" else []
    assert batches.sizes == [12, 12, *once, 12]
    assert len(backward) == 2 * count + (task != "denoise")


def test_more_samples_than_the_batch_size_go_through_in_parts(
    lab: Command, run: Path, batches: Batches
) -> None:
    result = lab("eval", "task=inpaint_box", "batch_size=3", *FOUR)
    assert result.code == 0, result.text
    assert batches.sizes == 3 * [3, 3, 1, 1, 3, 1]  # two steps of each part, then Stein's


def test_auto_takes_what_fits_and_gives_the_same(
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
    assert files == [5]  # the group of images of a file stays
    assert result.text.count("batch_size=auto: the device's memory holds 2 at once") == 1
    assert Path("auto/results.csv").read_text() == Path("two/results.csv").read_text()


def test_a_memory_that_is_too_small_is_named(lab: Command, run: Path, batches: Batches) -> None:
    batches.limit = 2
    result = lab("eval", "batch_size=4", *SMALL)
    assert result.code == 1 and "does not hold batch_size=4 (CUDA out of memory" in result.text
    assert "set batch_size=auto or below 4" in result.text and "Traceback" not in result.text
    batches.limit = 0
    result = lab("eval", "batch_size=auto", *SMALL)
    assert result.code == 1 and "batch_size=1" in result.text and "bfloat16" in result.text


def test_a_network_in_bfloat16(lab: Command, run: Path) -> None:
    """It is said in the report; figures are all but the same."""
    assert lab("eval", "sigma_t=0.2", "hydra.run.dir=a", *SMALL).code == 0
    reduced = lab("eval", "sigma_t=0.2", "precision=bfloat16", "hydra.run.dir=b", *SMALL)
    assert reduced.code == 0, reduced.text
    a, b = (table(name) for name in "ab")
    assert a["noisy", "psnr"] == b["noisy", "psnr"]
    for estimate in ("mmse", "sample"):
        assert 0 < abs(a[estimate, "psnr"][0] - b[estimate, "psnr"][0]) < 0.1
    assert "averaged weights, in bfloat16" in Path("b/report.html").read_text()
    assert "in bfloat16" not in Path("a/report.html").read_text()


def test_the_precision_of_training_is_not_that_of_operators(lab: Command, run: Path) -> None:
    """trainer.precision would have them under autocast; the numbers are those of float32."""
    for name, extra in (("a", []), ("b", ["trainer.precision=bf16-mixed"])):
        result = lab("eval", "task=super_resolution", f"hydra.run.dir={name}", *SMALL, *extra)
        assert result.code == 0, result.text
    assert Path("a/results.csv").read_text() == Path("b/results.csv").read_text()


@pytest.mark.parametrize("key", ["precision=bfloat16", "compile=true"])
def test_a_network_without_blocks_is_refused(
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
