"""Reports of trainings, evaluations and sweeps, written from their directories."""

import csv
import html
import re
import shutil
from pathlib import Path

import pytest
from conftest import Command
from PIL import Image

from diffusion_lab.command.report import main
from diffusion_lab.report.training_report import read_metrics, write_training_report

CONFIG = """\
name: my_prior
seed: 3
schedule: {_target_: diffusion_lab.schedule.Cosine}
data: {source: faces, size: 32, batch_size: 16}
paths: {output_dir: '${hydra:runtime.output_dir}'}
"""


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A run directory after 40 steps, with a row every 2 steps, two validations and 15 grids."""
    folder = tmp_path / "run"
    (folder / ".hydra" / "resumed-1").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(CONFIG)
    (folder / ".hydra" / "overrides.yaml").write_text("[seed=3]\n")
    (folder / ".hydra" / "resumed-1" / "overrides.yaml").write_text("[resume=run]\n")
    columns = ["step", "epoch", "train/loss", "train/lr", "my/own", "val/loss_ema"]
    columns += ["val/loss_bin/0.5", "val/loss_bin/1.0"]
    rows = [{"step": k, "train/loss": 1 / (1 + k), "train/lr": 0.1} for k in range(1, 40, 2)]
    rows += [
        {"step": 19, "val/loss_ema": 0.25, "val/loss_bin/0.5": 4, "val/loss_bin/1.0": 2},
        {"step": 39, "val/loss_ema": 0.5, "val/loss_bin/0.5": 3, "val/loss_bin/1.0": 1},
        {"step": 39, "my/own": 7},
    ]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "samples").mkdir()
    for step in range(1, 16):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"samples/grid-{step:07d}.png")
    for name in ("denoise-0000015", "schedule"):
        Image.new("RGB", (8, 8), (0, 9, 0)).save(folder / f"samples/{name}.png")
    return folder


def text(page: Path) -> str:
    return html.unescape(page.read_text())


def test_training_report_has_all_sections(training: Path) -> None:
    page = text(write_training_report(training))
    assert "<title>Training of my_prior</title>" in page
    assert "40 steps so far; the training has not finished." in page
    assert "averaged weights is 0.5; the least was 0.25 at step 20." in page
    titles = re.findall(r"<h2><a[^>]*>(.*?)</a>", page)
    assert titles == [
        "Samples of the prior", "Loss", "Validation loss by noise level",
        "Denoised validation images", "Noise schedule", "Learning rate", "my/own",
        "Figures", "Settings", "Configuration",
    ]  # fmt: skip
    # The animation has at most twelve grids, including both ends; other images are static.
    labels = re.findall(r'data-label="step (\d+)"', page)
    assert len(labels) == 12 and (labels[0], labels[-1]) == ("1", "15")
    assert page.count("<img") == 12 + 2
    for name, value in (
        ("Command", "python train.py seed=3"), ("Continued (1)", "resume=run"),
        ("Schedule", "Cosine"), ("Data", "faces, 32 pixels"), ("State", "not finished"),
        ("Seed", "3"),
    ):  # fmt: skip
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    (training / "finished.json").write_text("{}")
    assert '<p class="summary">40 steps. The' in text(write_training_report(training))


def test_curves_match_the_metrics_file(training: Path) -> None:
    metrics = read_metrics(training)
    assert metrics["val/loss_ema"] == ([20, 40], [0.25, 0.5])  # the number of completed steps
    assert metrics["train/loss"] == (list(range(2, 41, 2)), [1 / (1 + k) for k in range(1, 40, 2)])
    page = text(write_training_report(training))
    levels = page[page.index('id="validation-loss-by-noise-level"') :]
    legend = re.findall(r"<span>(.*?)</span>", levels[: levels.index("</ul>")])
    assert legend == ["step 20", "step 40"]
    lines = [
        [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
        for path in re.findall(r'class="line s\d" d="([^"]+)"><title>step', levels)
    ]
    # From 4 to 2 and from 3 to 1 on a logarithmic axis; the plot has a height of 260 and 4%
    # margins.
    octave = 260 / 1.08 / 2
    assert lines[0][1] - lines[0][0] == pytest.approx(octave, abs=0.2)
    assert lines[1][1] - lines[1][0] == pytest.approx(octave * 1.585, abs=0.2)


def test_directory_without_a_run_is_an_error_with_advice(
    training: Path, capsys: pytest.CaptureFixture
) -> None:
    (training / "metrics.csv").unlink()  # logger=none: images and settings remain
    assert "Nothing has been logged" in text(write_training_report(training))
    (training / "multirun.yaml").write_text("")
    for path, said in (
        (training.parent, "is no"), (training / "nowhere", "is not a directory"),
        (training, "no job has started"),
    ):  # fmt: skip
        (training / "report.html").unlink(missing_ok=True)
        assert main([str(path)]) == 1
        error = capsys.readouterr().err
        assert str(path) in error and ("give the directory" in error or said in error)
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "newest finished training" in capsys.readouterr().out


def test_every_command_writes_a_report(tiny: Command, lab: Command, run: Path) -> None:
    page = run / "report.html"
    logged = read_metrics(run)["val/loss_ema"][1][-1]
    assert f"averaged weights is {logged:.4g}" in text(page)
    assert "finished" in text(page) and "3 steps." in text(page)
    before = page.read_bytes()
    page.unlink()
    assert main([]) == 0 and page.read_bytes() == before  # of the newest training
    small = ["num_images=2", "num_samples=2", "sampler.steps=3", "trainer.accelerator=cpu"]
    assert lab("eval", "hydra.run.dir=e", *small).code == 0
    before = Path("e/report.html").read_bytes()
    assert main(["e"]) == 0 and Path("e/report.html").read_bytes() == before
    assert before.count(b"data-label=") == 4  # of the animation: three steps and the end
    Path("e/report.html").unlink()
    assert main(["e"]) == 1
    sweep = Path("sweep")
    shutil.copytree(run, sweep / "0")
    shutil.copytree(run, sweep / "1")
    (sweep / "multirun.yaml").write_text("")
    assert main(["sweep"]) == 0 and "2 jobs: 2 finished" in text(sweep / "report.html")


def test_failed_report_does_not_fail_the_training(
    tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffusion_lab.report.training_report.write_report", full)
        result = tiny("trainer.max_steps=1", "hydra.run.dir=a")
    assert result.code == 0 and Path("a/finished.json").exists()
    assert "report.html is not written: No space left" in result.text
