"""Sweeps: one directory per job, independent failures, and the summary."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from test_cli_train import assert_same, rows

from diffusion_lab.command import cli
from diffusion_lab.command.sweep import Sweep
from diffusion_lab.report.sweep_report import read_jobs, summarize
from diffusion_lab.runs import OBJECTIVE, load_checkpoint, mark_finished, objective


def summary(directory: Path) -> list[dict[str, str]]:
    with open(directory / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_failed_job_is_named_and_does_not_affect_the_others(tiny: Command) -> None:
    result = tiny("-m", "optimizer.lr=1e-3,-1,1e-4", "trainer.max_steps=2", "hydra.sweep.dir=s")
    assert result.code == 1
    reason = "optimizer.lr=-1 is not allowed; it must be a number > 0"
    assert "3 jobs, 2 finished, 1 failed: s/summary.csv and s/report.html" in result.text
    assert f"failed: job 1 (optimizer.lr=-1): {reason}" in result.text
    assert "Traceback" not in result.text
    assert json.loads(Path("s/1/failed.json").read_text())["error"] == reason
    table = summary(Path("s"))
    assert [row["status"] for row in table] == ["finished", "failed", "finished"]
    assert [row["optimizer.lr"] for row in table] == ["0.001", "-1", "0.0001"]
    assert [row["error"] for row in table] == ["", reason, ""]
    for k in (0, 2):
        logged = rows(Path(f"s/{k}"))
        for name in ("train/loss", "val/loss", "val/loss_ema"):
            last = [row[name] for row in logged if row[name]][-1]
            assert table[k][name] == last, name
        assert table[k]["step"] == "2"
        assert load_checkpoint(Path(f"s/{k}/checkpoints/last.ckpt"))["global_step"] == 2
    page = Path("s/report.html").read_text()
    assert "val/loss_ema over optimizer.lr" in page and reason.replace(">", "&gt;") in page
    # The summary reads the current files: job 2 is resumed, and the failure of job 1 is removed.
    assert tiny("resume=s/2", "trainer.max_steps=3").code == 0
    Path("s/1/failed.json").unlink()
    assert summarize(Path("s")) == 0
    assert [row["status"] for row in summary(Path("s"))] == ["finished", "unfinished", "finished"]
    assert [row["step"] for row in summary(Path("s"))] == ["2", "", "3"]


def test_resume_in_a_sweep_is_refused_before_files_are_written(tiny: Command) -> None:
    for values in ("a,b", "a"):
        result = tiny("-m", f"resume={values}", "seed=0,1", "hydra.sweep.dir=s")
        assert result.code == 1
        assert f"resume={values} continues one run" in result.text
        assert "Traceback" not in result.text and not Path("s").exists()
    assert Sweep.directory is None


@pytest.mark.parametrize("old", ["0/.hydra/config.yaml", "multirun.yaml"])
def test_sweep_into_the_directory_of_another_sweep_is_refused(lab: Command, old: str) -> None:
    """The jobs of the other sweep may be finished, unfinished, failed, or in subdirectories."""
    path = Path("s", old)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for command in ("train", "eval"):
        result = lab(command, "-m", "seed=0,1", "hydra.sweep.dir=s")
        message = "hydra.sweep.dir=s already holds the jobs of a sweep"
        assert result.code == 1 and result.text.startswith(message), result.text
    assert [each for each in Path("s").rglob("*") if each.is_file()] == [path]


def test_summary_of_an_evaluation_sweep_has_the_mean_results(lab: Command, run: Path) -> None:
    result = lab(
        "eval", "-m", "task=denoise", "sigma_t=0.3,0.5", "num_images=2", "num_samples=2",
        "sampler.steps=2", "trainer.accelerator=cpu", "hydra.sweep.dir=e",
    )  # fmt: skip
    assert result.code == 0, result.text
    table = summary(Path("e"))
    assert [row["sigma_t"] for row in table] == ["0.3", "0.5"]
    for row in table:
        assert row["status"] == "finished"
        with open(f"e/{row['job']}/results.csv", newline="") as file:
            means = {
                f"{r['estimate']}/{r['metric']}": float(r["mean"]) for r in csv.DictReader(file)
            }
        figures = {k: float(v) for k, v in row.items() if "/" in k}
        assert figures == pytest.approx(means, rel=0, nan_ok=True)
        assert len(figures) > 5
    assert "psnr over sigma_t" in Path("e/report.html").read_text()


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [({OBJECTIVE: 0.5}, 0.5), ({OBJECTIVE: math.inf}, math.inf), ({OBJECTIVE: math.nan}, None),
     ({}, None)],
)  # fmt: skip
def test_objective_of_a_job_is_a_number_or_none(
    tmp_path: Path, metrics: dict, expected: float | None
) -> None:
    """Optuna ends the study if a job returns NaN, and skips a job that returns None."""
    mark_finished(tmp_path, step=3, metrics=metrics)
    assert objective(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("losses", [[math.nan, 0.25, math.nan], [math.nan] * 3])
def test_search_with_optuna_skips_a_trial_that_ends_in_nan(
    losses: list[float], tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    values = iter(losses)
    monkeypatch.setattr(
        cli, "fit",
        lambda config: mark_finished(
            Path(config.paths.output_dir), step=1, metrics={OBJECTIVE: next(values)}
        ),
    )  # fmt: skip
    result = tiny(
        "-m", "sweep=optuna", "optimizer.lr=interval(1e-4,1e-2)", "hydra.sweeper.n_trials=3",
        "hydra.sweep.dir=s",
    )  # fmt: skip
    assert len(summary(Path("s"))) == 3 and "No trials" not in result.text
    if not any(map(math.isfinite, losses)):
        assert result.code == 1 and "no job of the search has finished" in result.text
        return
    assert result.code == 0, result.text
    best = yaml.safe_load(Path("s/optimization_results.yaml").read_text())
    assert best["best_value"] == 0.25


@pytest.mark.slow
def test_sweep_with_optuna_minimizes_the_validation_loss(tiny: Command) -> None:
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    result = tiny(
        "-m", "sweep=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "seed=3",
        "hydra.sweeper.n_trials=2", "trainer.max_steps=2", "hydra.sweep.dir=s",
    )  # fmt: skip
    assert result.code == 0, result.text
    losses = [float(row["val/loss_ema"]) for row in summary(Path("s"))]
    best = yaml.safe_load(Path("s/optimization_results.yaml").read_text())
    assert len(set(losses)) == 2 and best["best_value"] == min(losses)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3))
    first = study.ask().suggest_float("optimizer.lr", 1e-4, 1e-2, log=True)
    assert float(summary(Path("s"))[0]["optimizer.lr"]) == first


@pytest.mark.slow
def test_job_with_two_devices_does_not_affect_the_next_job(tiny: Command) -> None:
    """The first job starts two processes; the second runs in this process."""
    before, threads = dict(os.environ), torch.get_num_threads()
    common = ["data.batch_size=4", "lr_schedule=constant", "seed=5", "trainer.max_steps=2"]
    result = tiny("-m", *common, "trainer.devices=2,1", "hydra.sweep.dir=s")
    assert result.code == 0, result.text
    assert not torch.distributed.is_initialized()
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    assert changed <= {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}, "other variables than seeds"
    assert torch.get_num_threads() == threads
    assert {p.name for p in Path("s").iterdir()} == {
        "0", "1", "multirun.yaml", "report.html", "summary.csv"
    }  # fmt: skip
    for k, devices in enumerate((2, 1)):
        config = load_checkpoint(Path(f"s/{k}/checkpoints/last.ckpt"))["diffusion_lab"]["config"]
        assert config["trainer"]["devices"] == devices
        assert config["paths"]["output_dir"] == str(Path(f"s/{k}").resolve())
        assert len(list(Path(f"s/{k}").glob("*.log"))) == 1
        assert f"finished: {Path(f's/{k}').resolve()}" in Path(f"s/{k}/train.log").read_text()
    assert tiny(*common, "hydra.run.dir=one").code == 0
    assert_same(Path("one/checkpoints/last.ckpt"), Path("s/1/checkpoints/last.ckpt"))
    assert tiny(*common, "data.batch_size=8", "hydra.run.dir=two").code == 0
    losses = [[float(r["train/loss"]) for r in rows(Path(d)) if r["train/loss"]]
              for d in ("s/0", "two")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_every_job_of_a_sweep_can_use_two_devices(tiny: Command, lab: Command) -> None:
    result = tiny(
        "-m", "trainer=ddp_sim", "schedule=linear,cosine", "data.batch_size=4",
        "trainer.max_steps=2", "pretrained=null,nowhere", "hydra.sweep.dir=s",
    )  # fmt: skip
    assert result.code == 1
    jobs = read_jobs(Path("s"))
    assert [job.status for job in jobs] == ["finished", "failed"] * 2
    assert "there is no config.json in nowhere" in jobs[1].error
    for k, kind in ((0, "Linear"), (2, "Cosine")):
        config = load_checkpoint(Path(f"s/{k}/checkpoints/last.ckpt"))["diffusion_lab"]["config"]
        assert config["schedule"]["_target_"].endswith(kind)
    common = ["run=s/0", "num_images=3", "num_samples=2", "sampler.steps=2", "batch_size=2"]
    for trainer in ("ddp_sim", "cpu"):
        result = lab(
            "eval", "-m", *common, "task=denoise", "sigma_t=0.3,0.5", f"trainer={trainer}",
            f"hydra.sweep.dir={trainer}",
        )  # fmt: skip
        assert result.code == 0, result.text
    for a, b in zip(read_jobs(Path("ddp_sim")), read_jobs(Path("cpu")), strict=True):
        assert a.figures == pytest.approx(b.figures, rel=1e-5, abs=1e-6, nan_ok=True)


def test_summary_needs_only_the_job_directories(tmp_path: Path) -> None:
    """Jobs are in numerical order; one of them has only its overrides."""
    for k in (0, 2, 10):
        folder = tmp_path / str(k)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- +a.b={k}=x\n- seed=1\n")
    (tmp_path / "2" / "failed.json").write_text('{"error": "one\\ntwo"}')
    (tmp_path / "10" / "finished.json").write_text("{}")
    (tmp_path / "10" / "metrics.csv").write_text(
        "step,val/loss_ema,val/loss_bin/0.1\n3,0.5,9\n7,0.25,9\n8,,\n"
    )
    assert summarize(tmp_path) == 1
    table = summary(tmp_path)
    assert [(row["job"], row["a.b"], row["seed"]) for row in table] == [
        ("0", "0=x", "1"), ("2", "2=x", "1"), ("10", "10=x", "1")
    ]  # fmt: skip
    assert [row["status"] for row in table] == ["unfinished", "failed", "finished"]
    assert (table[2]["step"], table[2]["val/loss_ema"]) == ("9", "0.25")
    assert "val/loss_bin/0.1" not in table[2] and table[1]["error"] == "one\ntwo"
    job = read_jobs(tmp_path)[2]
    assert job.losses == ([4, 8], [0.5, 0.25])
    assert summarize(tmp_path / "0") == 0 and not (tmp_path / "0" / "summary.csv").exists()
