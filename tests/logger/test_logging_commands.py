"""Loggers in the commands: records of W&B (offline, read from its files) and of TensorBoard."""

import csv
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from conftest import TINY, Command
from PIL import Image
from wandb_file import Offline, read

from diffusion_lab.logger import wandb_logger as logger
from diffusion_lab.logger.wandb_workspace import (
    SECTIONS,
    BarPanel,
    ImagePanel,
    LinePanel,
    ParallelCoordinatesPanel,
)
from diffusion_lab.training.module import DiffusionModule

ROOT = Path(__file__).parents[2]
FID = [
    "task=fid", "num_samples=9", "num_seeds=1", "sampler.steps=2", "trainer.accelerator=cpu",
    "extractor._target_=diffusion_lab.metric.feature_statistics.PooledPixels",  # fast
]  # fmt: skip
SMALL = ["num_images=2", "num_samples=2", "sampler.steps=3", "trainer.accelerator=cpu"]


def results(directory: str) -> dict[str, float]:
    with open(Path(directory) / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {f"eval/{row['estimate']}_{row['metric']}": float(row["mean"]) for row in rows}


def pictures(run: Offline, key: str) -> list[Path]:
    """The files of the last logged images with a key."""
    return [run.directory / "files" / name for name in run.last(key)["filenames"]]


@pytest.mark.slow
def test_sweep_without_an_account_is_a_group_of_offline_runs(tmp_path: Path) -> None:
    """The environment is that of a new user: no key, no login, WANDB_MODE not set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    environment["DIFFUSION_LAB_CACHE"] = str(tmp_path / "cache")
    sweep = ["seed=1,2", "trainer.max_steps=1", "logger=wandb", "hydra.sweep.dir=first/lr"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *TINY, *sweep],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for job, seed in enumerate((1, 2)):
        directory = tmp_path / "first" / "lr" / str(job)
        (run,) = read(directory)
        assert run.code == 0
        assert run.run.run_id == (directory / "wandb_id").read_text()
        assert (run.run.run_group, run.run.job_type) == ("lr", "train")
        assert (run.run.display_name, list(run.run.tags)) == (f"ddpm_faces/{job}", ["ddpm_faces"])
        assert run.config["seed"] == seed
        assert run.config["schedule"]["_target_"] == "diffusion_lab.schedule.Cosine"
        assert run.config["optimizer"]["betas"] == [0.9, 0.99]  # resolved, from the experiment
        assert str(tmp_path) not in str({k: v for k, v in run.config.items() if k != "_wandb"})
        assert "paths" not in run.config and "logger" not in run.config


def test_crash_is_a_failed_run_and_can_be_resumed(
    tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DiffusionModule.training_step

    def crash(self: DiffusionModule, batch: dict, batch_idx: int) -> object:
        if batch_idx == 2:
            raise OSError("No space left on device")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", crash)
        options = ["trainer.max_steps=4", "checkpoint.every_n_steps=1", "hydra.run.dir=a"]
        assert tiny("logger=wandb", *options).code == 1
    (run,) = read("a")
    assert run.code == 1
    steps = [row["trainer/global_step"] for row in run.rows if "train/loss" in row]
    assert steps == [0, 1]  # values logged before the crash are kept
    assert tiny("resume=a").code == 0
    first, second = read("a")
    assert (first.code, second.code) == (1, 0)
    assert first.run.run_id == second.run.run_id == Path("a/wandb_id").read_text()


@pytest.mark.slow
def test_dashboard_has_exactly_the_logged_keys(tiny: Command, lab: Command) -> None:
    options = ["fid.every_n_steps=10", "fid.num_samples=4", "fid.sampler.steps=1"]
    options += ["samples.every_n_steps=20"]
    options += ["data.splits={train: 16, val: 16, test: 16}"]
    steps = [
        "trainer.max_steps=20",
        "hydra.run.dir=outputs/train/a",
    ]  # enough for every noise level
    result = tiny("logger=wandb", *steps, *options)
    assert result.code == 0, result.text
    assert lab("eval", "logger=wandb", "sigma_t=0.5", "hydra.run.dir=e", *SMALL).code == 0
    assert lab("eval", "logger=wandb", "hydra.run.dir=f", *FID).code == 0
    (training,), (evaluation,), (quality,) = read("outputs/train/a"), read("e"), read("f")
    found = training.keys | evaluation.keys | quality.keys
    panels = [panel for section in SECTIONS.values() for panel in section]
    for panel in panels:
        if isinstance(panel, LinePanel) and panel.pattern:
            assert any(re.fullmatch(panel.pattern, key) for key in found), panel
        elif isinstance(panel, LinePanel | BarPanel | ImagePanel):
            assert set(panel.keys) <= found, set(panel.keys) - found
        if isinstance(panel, ImagePanel):
            for key in panel.keys:
                run = training if key in training.keys else evaluation
                for path in pictures(run, key):
                    with Image.open(path) as image:
                        image.load()
                        assert image.format == "PNG" and min(image.size) >= 16
        if isinstance(panel, ParallelCoordinatesPanel):
            assert panel.metric in found
            for key in panel.keys:
                assert any(has(run.config, key) for run in (training, evaluation)), key
    # Every logged key is on the dashboard, except those that another key replaces.
    charts = [p for p in panels if not isinstance(p, ParallelCoordinatesPanel)]
    shown = {key for panel in charts for key in panel.keys}
    logged = {key for key in training.keys if "/" in key} - shown
    assert {k for k in logged if not k.startswith(("val/frechet", "val/fid"))} == {
        "trainer/global_step"
    }


def has(config: dict, key: str) -> bool:
    for name in key.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def test_evaluation_logs_its_table_and_images(lab: Command, run: Path) -> None:
    result = lab("eval", "logger=wandb", "sigma_t=0.5", "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    (logged,) = read("e")
    assert (logged.code, logged.run.job_type, list(logged.run.tags)) == (0, "eval", ["denoise"])
    assert not Path("e/metrics.csv").exists()
    expected = results("e")
    assert len(expected) >= 10
    for key, value in expected.items():
        assert logged.last(key) == pytest.approx(value, nan_ok=True)
    table = logged.last("eval/results")
    assert (table["nrows"], table["ncols"]) == (len(expected), 5)
    for name in ("grid", "denoising", "diffusion"):
        (path,) = pictures(logged, f"eval/{name}")
        with Image.open(path) as one, Image.open(f"e/samples/{name}.png") as other:
            assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


def test_checkpoints_are_uploaded_only_on_request_and_with_an_account(
    tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["trainer.max_steps=2", "logger=wandb"]
    result = tiny(*options, "logger.wandb.log_model=true", "hydra.run.dir=a")
    assert result.code == 1 and "Traceback" not in result.text
    assert "logger.wandb.log_model=True" in result.text and "wandb login" in result.text
    result = tiny(*options, "logger.wandb.log_model=best", "hydra.run.dir=a")
    assert result.code == 1 and "one of false, true, all" in result.text
    # With an account; the run itself stays offline.
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(logger.wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "init", functools.partial(offline, wandb.init))
    result = tiny(*options, "logger.wandb.log_model=true", "hydra.run.dir=b")
    assert result.code == 0, result.text
    (run,) = read("b")
    (artifact,) = run.artifacts
    assert artifact.type == "model" and "best" in list(artifact.aliases)
    assert [Path(entry.path).name for entry in artifact.manifest.contents] == ["model.ckpt"]


def offline(init: object, **options: object) -> object:
    return init(**{**options, "mode": "offline", "resume": None})


@pytest.mark.slow
def test_tensorboard_has_the_same_keys(tiny: Command, lab: Command) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tiny("logger=tensorboard", "trainer.max_steps=2", "hydra.run.dir=a").code == 0
    assert tiny("resume=a", "trainer.max_steps=4", "lr_schedule=constant").code == 0
    events = EventAccumulator("a/tensorboard")
    events.Reload()
    with open("a/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in rows[0].keys() - {"step"}:
        logged = [(e.step, e.value) for e in events.Scalars(key)]
        kept = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        assert dict(logged) == pytest.approx(dict(kept)), key
        assert key == "epoch" or [step for step, _ in logged] == [step for step, _ in kept]
    images = {"grid", "denoise", "progressive", "levels", "nearest"}
    assert {f"samples/{name}" for name in images} <= set(events.Tags()["images"])
    assert [e.step for e in events.Images("samples/grid")] == [2, 4]
    assert (
        "schedule" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    result = lab("eval", "run=a", "logger=tensorboard", "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    events = EventAccumulator("e/tensorboard")
    events.Reload()
    for key, value in results("e").items():
        assert events.Scalars(key)[0].value == pytest.approx(value, nan_ok=True)
    assert "eval/grid" in events.Tags()["images"]
    assert "eval/results/text_summary" in events.Tags()["tensors"]
