"""Two processes on one CPU do what one does, with numbers of images that they do not divide."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from diffusion_lab.runs import load_checkpoint

ROOT = Path(__file__).parent.parent
OWN = ("data.splits", "data.batch_size", "trainer.accelerator")  # set below instead
SPLITS = "data.splits={train: 64, val: 15, test: 15}"


def command(script: str, *overrides: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *overrides],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def last_row(path: str) -> dict[str, float]:
    with open(path, newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return {name: float(value) for name, value in row.items() if value}


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LAB_CACHE", str(tmp_path / "cache"))
    tiny = [text for text in TINY if not text.startswith(OWN)]
    common = [*tiny, SPLITS, "trainer.max_steps=6"]
    command("train.py", *common, "trainer=cpu", "data.batch_size=8", "hydra.run.dir=one")
    command("train.py", *common, "trainer=ddp_sim", "data.batch_size=4", "hydra.run.dir=two")
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "one", "two"}

    one, two = (load_checkpoint(Path(d) / "checkpoints/last.ckpt") for d in ("one", "two"))
    for name, value in one["state_dict"].items():
        assert torch.allclose(two["state_dict"][name], value, rtol=0, atol=2e-6), name
    validation = last_row("one/metrics.csv")
    assert validation["val/loss_ema"] > 0
    assert last_row("two/metrics.csv") == pytest.approx(validation, rel=1e-5)

    small = ["run=one", "num_images=5", "num_samples=3", "sampler.steps=2"]
    command("eval.py", *small, "trainer=cpu", "hydra.run.dir=e1")
    command("eval.py", *small, "trainer=ddp_sim", "hydra.run.dir=e2")
    rows = []
    for directory in ("e1", "e2"):
        with open(f"{directory}/results.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    for a, b in zip(*rows, strict=True):
        assert (a["estimate"], a["metric"], a["n"]) == (b["estimate"], b["metric"], b["n"])
        assert float(b["mean"]) == pytest.approx(float(a["mean"]), rel=1e-5)
