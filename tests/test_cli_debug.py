"""Debug configurations by command, and a run without a logger."""

import csv
import json
from pathlib import Path

import pytest
from conftest import TINY, Command
from lightning import Trainer

from diffusion_lab.callback import LastCheckpoint, OverfitSubset, TrainingInterrupted
from diffusion_lab.runs import load_checkpoint

SMALL = [  # keys that a debug configuration does not set
    "network=unet_tiny", "data.size=16", "data.splits={train: 64, val: 16, test: 16}",
    "trainer.accelerator=cpu", "lr_schedule.warmup=0",
]  # fmt: skip


def rows(run: str) -> list[dict[str, str]]:
    with open(Path(run) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_overfit_reduces_the_loss_of_eight_images(lab: Command) -> None:
    """An epoch is one batch of 8 images. The loss starts near 1: a new network predicts 0."""
    quick = ["sampler.steps=2", "optimizer.lr=1e-2", "trainer.max_steps=160",
             "trainer.log_every_n_steps=1"]  # fmt: skip
    result = lab("train", "debug=overfit", *SMALL, *quick)
    assert result.code == 0, result.text
    (run,) = Path("outputs/debug").glob("*/*")
    assert not Path("outputs/train").exists()
    logged = [row for row in rows(str(run)) if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in logged]
    assert [int(row["epoch"]) for row in logged] == list(range(160))
    assert losses[0] > 0.9 and sum(losses[-20:]) / 20 < 0.3
    assert float(logged[-1]["train/images"]) == 8 * 160


def test_overfit_subset_smaller_than_a_batch_is_refused(tiny: Command) -> None:
    result = tiny("debug=overfit", "data.batch_size=16", "hydra.run.dir=a")
    assert result.code == 1
    for part in ("callbacks.overfit_subset.count=8", "data.batch_size=16", "Traceback"):
        assert (part in result.text) == (part != "Traceback")


def test_overfit_subset_is_the_first_images_of_the_split(tiny: Command, monkeypatch) -> None:
    seen: list[list[int]] = []
    setup = OverfitSubset.setup

    def note(self: OverfitSubset, trainer, module, stage: str) -> None:
        before = trainer.datamodule.images["train"].positions[:8].tolist()
        setup(self, trainer, module, stage)
        seen.extend([before, trainer.datamodule.images["train"].positions.tolist()])

    monkeypatch.setattr(OverfitSubset, "setup", note)
    tiny("debug=overfit", "trainer.max_steps=1", "hydra.run.dir=a")
    assert seen[0] == seen[1] and len(seen[0]) == 8


@pytest.mark.slow
def test_limit_is_a_short_but_complete_run(lab: Command) -> None:
    result = lab("train", "debug=limit", *SMALL, "hydra.run.dir=a")
    assert result.code == 0, result.text
    logged = rows("a")
    assert [int(row["step"]) for row in logged if row["train/loss"]] == [4, 9, 14, 19]
    assert [int(row["step"]) for row in logged if row["val/loss"]] == [9, 19]
    names = {p.name for p in Path("a/samples").iterdir()}
    assert {"grid-0000010.png", "grid-0000020.png", "levels-0000020.png"} < names
    assert load_checkpoint(Path("a/checkpoints/last.ckpt"))["global_step"] == 20
    assert json.loads(Path("a/finished.json").read_text())["step"] == 20


@pytest.mark.slow
def test_profiler_writes_a_table_of_operations(lab: Command) -> None:
    result = lab("train", "debug=profiler", *SMALL, "data.batch_size=8", "hydra.run.dir=a")
    assert result.code == 0, result.text
    table = Path("a/fit-profile.txt").read_text()
    lines = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    assert lines["ProfilerStep*"][-1] == "3"  # number of recorded steps
    assert int(lines["aten::convolution"][-1]) > 3
    assert "validation_step" not in table
    assert "aten::convolution_backward" in lines


def test_run_without_a_logger_trains(lab: Command) -> None:
    without_csv = [text for text in TINY if not text.startswith("logger")]
    result = lab("train", *without_csv, "logger=none", "trainer.max_steps=2", "hydra.run.dir=a")
    assert result.code == 0, result.text
    assert not Path("a/metrics.csv").exists()
    metrics = json.loads(Path("a/finished.json").read_text())["metrics"]
    assert metrics["train/images"] == 16 and metrics["val/loss_ema"] > 0


def test_every_row_of_the_metrics_file_has_all_values(tiny: Command) -> None:
    """The rows are written at steps 3, 6 and 7; the last row covers a single step."""
    result = tiny("trainer.max_steps=7", "trainer.log_every_n_steps=3", "hydra.run.dir=a")
    assert result.code == 0, result.text
    logged = [row for row in rows("a") if row["train/loss"]]
    assert [int(row["step"]) for row in logged] == [2, 5, 6]
    assert [float(row["train/images"]) for row in logged] == [24, 48, 56]
    keys = ["train/grad_norm", "train/lr", "train/skipped", "perf/images_per_second",
            "perf/tflops", "perf/mfu", "perf/memory_gb"]  # fmt: skip
    for row in logged:
        assert all(float(row[key]) > 0 for key in keys if key != "train/skipped")
        assert float(row["train/skipped"]) == 0
    bins = [key for key in logged[-1] if key.startswith("train/loss_bin/")]
    assert sorted(bins) == [f"train/loss_bin/{k / 10:.1f}" for k in range(1, 11)]


@pytest.mark.slow
def test_run_resumed_between_log_rows_has_the_same_rows(
    tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops after step 6, with a row every 4 steps.

    The losses by noise level in the row of step 8 include images from before the stop.
    """
    common = ["trainer.log_every_n_steps=4", "trainer.max_steps=8", "checkpoint.every_n_steps=6"]
    tiny(*common, "hydra.run.dir=a")

    def stop(self: LastCheckpoint, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 6:
            raise TrainingInterrupted("a signal", 6)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_start", stop)
        assert tiny(*common, "hydra.run.dir=b").code == 0
    assert load_checkpoint(Path("b/checkpoints/last.ckpt"))["global_step"] == 6
    assert tiny("resume=b").code == 0
    whole, resumed = (
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(run)]
        for run in "ab"
    )
    assert whole == resumed and [int(row["step"]) for row in whole] == [3, 7, 7]
    assert float(whole[1]["train/images"]) == 64
