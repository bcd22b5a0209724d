"""Distributed FID: two processes on one CPU give the values of one."""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from test_distributed import OWN, SPLITS, command

PIXELS = "extractor._target_=diffusion_lab.metric.feature_statistics.PooledPixels"


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_fid_of_two_processes_equals_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 images in batches of 4 give six batches, the last of them with a single image.

    The task sorts the features of the images, so the tables are equal in every digit. Training
    merges moments. Its learning rate is nearly zero, because two processes add gradients in
    another order.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_LAB_CACHE", str(tmp_path / "cache"))
    tiny = [text for text in TINY if not text.startswith(OWN)]
    fid = ["fid.every_n_steps=1", "fid.num_samples=21", "fid.batch_size=4", "fid.sampler.steps=2",
           PIXELS]  # fmt: skip
    common = [*tiny, SPLITS, "trainer.max_steps=1", "optimizer.lr=1e-12", *fid]
    found = []
    for trainer, batch_size in (("cpu", 8), ("ddp_sim", 4)):
        command("train.py", *common, f"trainer={trainer}", f"data.batch_size={batch_size}",
                f"hydra.run.dir=train-{trainer}")  # fmt: skip
        # Each run computes the reference statistics itself: a shared file would hide a difference.
        shutil.rmtree("cache/statistics")
        column = "val/frechet_pixels8_21"
        found += [float(r[column]) for r in rows(f"train-{trainer}/metrics.csv") if r.get(column)]
    assert len(found) == 2 and found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-6)

    small = ["task=fid", "run=train-cpu", "num_samples=21", "num_seeds=1", "sampler.steps=2"]
    for trainer in ("cpu", "ddp_sim"):
        command(
            "eval.py", *small, "batch_size=4", f"trainer={trainer}", f"hydra.run.dir={trainer}"
        )
        shutil.rmtree("cache/statistics")
    assert len(rows("cpu/results.csv")) == 18
    assert rows("ddp_sim/results.csv") == rows("cpu/results.csv")
