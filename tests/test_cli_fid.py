"""Evaluation with task=fid: metrics, resuming after a kill, and rejected input."""

import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from conftest import Command, find_refusal
from PIL import Image
from test_cli_eval import table

from diffusion_lab.command import cli
from diffusion_lab.metric import (
    Moments,
    extract,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusion_lab.metric.feature_statistics import PooledPixels
from diffusion_lab.runs import rebuild
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.task import FID

FEW = [
    "task=fid", "num_samples=9", "num_seeds=2", "sampler.steps=2", "trainer.accelerator=cpu",
    "extractor._target_=diffusion_lab.metric.feature_statistics.PooledPixels",  # quick
]  # fmt: skip


def test_metrics_are_those_of_the_images_written_by_generate(lab: Command, run: Path) -> None:
    result = lab("eval", *FEW, "batch_size=4", "hydra.run.dir=e")
    assert result.code == 0, result.text
    common = ["sampler.steps=2", "trainer.accelerator=cpu", "batch_size=4"]
    lab("eval", "task=generate", "num_samples=18", "hydra.run.dir=g", *common)
    blocks = torch.from_numpy(np.load("g/samples.npy")).split(9)
    data = instantiate(rebuild(run).config["data"], "data")
    data.setup("fit")
    network = PooledPixels()
    real = extract(network, torch.from_numpy(data.images["train"][:]))
    assert len(real) == 64
    found, values = table("e"), {"frechet": [], "kernel": [], "precision": [], "recall": []}
    for k, block in enumerate(blocks):
        drawn = extract(network, block)
        values["frechet"].append(frechet_distance(Moments.of(drawn), Moments.of(real)))
        values["kernel"].append(kernel_distance(drawn, real)[0])
        for name, value in zip(
            ("precision", "recall"), precision_recall(drawn, real), strict=True
        ):
            values[name].append(value)
        for name, each in values.items():
            value, _, n = found[f"block {k}", f"{name}_pixels8_9"]
            assert value == pytest.approx(each[k], rel=1e-3), name
            assert n == 9
    for name, each in values.items():
        title = f"{name}_pixels8_9"
        std = stdev(each)
        expected = (mean(each), std / math.sqrt(2), 2)
        assert found["mean", title] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert found["std", title][0] == pytest.approx(std, rel=1e-3, abs=1e-9)
        if name in ("frechet", "kernel"):
            assert found["min", title][0] == pytest.approx(min(each), rel=1e-3)
    # Samples of a nearly untrained network are farther from the training images than real ones.
    assert found["train", "frechet_pixels8_9"][0] < min(values["frechet"])
    page = Path("e/report.html").read_text()
    for text in ("pixels8, 198 features", "64 images of the train split", "Ancestral", "averaged"):
        assert text in page
    with Image.open("e/samples/grid.png") as grid:
        assert min(grid.size) > 16
    # Another batch size gives the same images up to rounding.
    lab("eval", *FEW, "hydra.run.dir=whole")
    for key, (value, _, _) in table("whole").items():
        assert value == pytest.approx(found[key][0], rel=1e-3, abs=1e-6, nan_ok=True), key


def killed(group: int, *overrides: str) -> None:
    """Runs eval.py in a process that kills itself after a number of groups is saved."""
    step, kept = FID.test_step, []

    def last(task: FID, *arguments: object) -> None:
        step(task, *arguments)
        kept.append(1)
        if len(kept) == group:
            os.kill(os.getpid(), signal.SIGKILL)

    def command() -> None:
        FID.test_step = last
        sys.argv = ["eval.py", *overrides]
        cli.evaluate()

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_killed_and_resumed_evaluation_has_the_same_table(lab: Command, run: Path) -> None:
    few = [*FEW, "batch_size=4", "reference=test"]
    lab("eval", *few, "hydra.run.dir=whole")
    killed(2, *few, "hydra.run.dir=e")
    assert not Path("e/results.csv").exists()
    refused = lab("eval", "resume=e", "seed=1")
    assert refused.code == 1 and "seed=1 would change it" in refused.text
    result = lab("eval", "resume=e", "trainer.accelerator=cpu")
    assert result.code == 0 and "8 of 18 images are done already" in result.text, result.text
    assert Path("e/results.csv").read_text() == Path("whole/results.csv").read_text()


BAD = [
    (["num_samples=0"], "num_samples=0 is not allowed"),
    (["num_seeds=0"], "num_seeds=0 is not allowed"),
    (["reference=trian"], "reference=trian is not allowed; it must be one of train, val, test"),
    (["extractor=inceptoin"], "inceptoin"),
    (["extractor=dinov2", "extractor.size=huge"], "extractor.size=huge is not allowed"),
    (["task=generate", "extractor=inception"], "extractor"),
]


@pytest.mark.parametrize(("overrides", "named"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_invalid_value_is_named(overrides: list[str], named: str) -> None:
    """The error occurs before the command searches for a run; none exists here."""
    assert named in find_refusal("eval", "task=fid", *overrides)


def test_too_few_samples_and_missing_weights_are_named(lab: Command, run: Path) -> None:
    for overrides, named in (
        (["num_samples=7"], "num_samples=7 is not allowed; it must be an integer >= 8"),
        (["extractor=inception", "extractor.weights=nowhere"], "extractor.weights=nowhere is no"),
    ):
        result = lab("eval", "task=fid", *overrides)
        assert result.code == 1, overrides
        assert named in result.text and "Traceback" not in result.text
