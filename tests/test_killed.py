"""Killed runs: a resumed run equals an uninterrupted one bit for bit."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import TINY, Whole
from crash_injection import TEXT, seen, train

from diffusion_lab.runs import load_checkpoint

# 8 batches an epoch and 21 in all, a validation in the middle of an epoch, every 5 batches.
RUN = [
    *TINY, "hydra.run.dir=run", "trainer.max_steps=21", "trainer.val_check_interval=5",
    "checkpoint.every_n_steps=3", "samples.every_n_steps=5", "lr_schedule.warmup=2",
]  # fmt: skip
VARIANTS = {
    "plain": [],
    "threads": [
        "data.num_workers=2",
        "data.order=interleave",
        "data.interleave=2",
        "data.drop_last=false",
    ],
    "accumulation": ["trainer.accumulate_grad_batches=2", "trainer.max_steps=11"],
}
# Each place is a call in the life of the process; with 4 images of a validation batch there are
# 2 validation batches of 8 images.
CUES = [
    "step:1", "step:2", "step:4", "step:5", "step:8", "step:9", "step:12", "step:16", "step:17",
    "step:20", "stepped:3", "stepped:8", "stepped:16", "validation:1", "validation:2",
    "validation:4", "validated:1", "validated:3", "write:1", "write:2", "write:5", "replace:1",
    "replace:3", "written:1", "written:4", "packed:1",
]  # fmt: skip
FEW = ["step:17", "write:2"]  # all of them, in every variant, are slow


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, averaged weights, optimizer state, learning rate and counters."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    result = dict(checkpoint["state_dict"])
    for k, each in checkpoint["optimizer_states"][0]["state"].items():
        result |= {f"optimizer.{k}.{name}": value for name, value in each.items()}
    for name in ("global_step", "epoch"):
        result[name] = torch.tensor(checkpoint[name])
    result["lr"] = torch.tensor(checkpoint["lr_schedulers"][0]["_last_lr"])
    return result


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        rows = [  # without the figures that are times
            {k: v for k, v in row.items() if v and not k.startswith("perf/")}
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: (int(row["step"]), sorted(row)))


def check(cue: str, variant: str, whole: Whole, tmp_path: Path) -> None:
    directory, expected = tmp_path / "killed", whole(*RUN, *VARIANTS[variant])
    assert train(cue, directory, *RUN, *VARIANTS[variant]) == -9, (directory / TEXT).read_text()
    run = directory / "run"
    assert not (run / "finished.json").exists()
    if (run / "checkpoints" / "last.ckpt").exists():
        again = ["resume=run"]
    else:
        again = [*RUN, *VARIANTS[variant]]
    code = train("", directory, *again)
    assert code == 0, (directory / TEXT).read_text()
    assert (run / "finished.json").exists()
    actual, target = state(run), state(expected / "run")
    assert actual.keys() == target.keys()
    for name, value in target.items():
        assert torch.equal(actual[name], value), name
    assert seen(directory) == seen(expected)
    rows, target = metrics(run), metrics(expected / "run")
    if cue.startswith("written"):  # the checkpoint is there, what that step logged is not yet
        missing = [row for row in target if row not in rows]
        assert len({row["step"] for row in missing}) <= 1
        assert not any("val/loss" in row for row in missing)
        target = [row for row in target if row not in missing]
    assert rows == target
    pictures = {p.name: p.read_bytes() for p in (expected / "run" / "samples").iterdir()}
    assert {p.name: p.read_bytes() for p in (run / "samples").iterdir()} == pictures


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow if name != "plain" else ()) for name in VARIANTS],
)
def test_an_uninterrupted_run_sees_every_image_once_an_epoch(variant: str, whole: Whole) -> None:
    directory = whole(*RUN, *VARIANTS[variant])
    places = seen(directory)
    for epoch in (0, 1):
        ids = [k for (_, e, _), batch in places.items() if e == epoch for k in batch]
        assert sorted(ids) == list(range(64))
    assert len(places) == (21 if variant != "accumulation" else 22)
    assert sum("val/loss" in row for row in metrics(directory / "run")) == 5


@pytest.mark.parametrize("cue", FEW)
def test_killed_and_resumed(cue: str, whole: Whole, tmp_path: Path) -> None:
    check(cue, "plain", whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cue", CUES)
def test_killed_anywhere(cue: str, variant: str, whole: Whole, tmp_path: Path) -> None:
    check(cue, variant, whole, tmp_path)


@pytest.mark.slow
def test_killed_three_times_in_one_epoch(whole: Whole, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    expected = whole(*RUN, *VARIANTS["threads"])
    assert train("step:12", directory, *RUN, *VARIANTS["threads"]) == -9
    for cue in ("step:3", "step:5"):
        assert train(cue, directory, "resume=run") == -9
    assert train("", directory, "resume=run") == 0
    actual, target = state(directory / "run"), state(expected / "run")
    assert all(torch.equal(actual[name], value) for name, value in target.items())
    assert seen(directory) == seen(expected)


EVALUATION = ["num_images=7", "num_samples=2", "batch_size=4", "sampler.steps=3", "run=run",
              "hydra.run.dir=e", "trainer.accelerator=cpu"]  # fmt: skip


@pytest.mark.parametrize(
    "cue",
    [
        "kept:4",
        *(
            pytest.param(cue, marks=pytest.mark.slow)
            for cue in ("computed:1", "kept:1", "computed:3", "finished:1")
        ),
    ],
)
def test_an_evaluation_goes_on_to_the_same_table(whole: Whole, tmp_path: Path, cue: str) -> None:
    """Four groups of images; the last kill is after the report, before the parts are removed."""
    plain = whole(*RUN)
    (tmp_path / "run").symlink_to(plain / "run")
    (tmp_path.parent / "cache").exists() or (tmp_path.parent / "cache").symlink_to(
        plain.parent / "cache"
    )
    assert train("", tmp_path, *EVALUATION[:-2], "hydra.run.dir=once", command="eval") == 0
    assert train(cue, tmp_path, *EVALUATION, command="eval") == -9
    parts = len(list((tmp_path / "e/partial").glob("*.pt")))
    assert parts == {"computed:1": 0, "kept:1": 1, "computed:3": 2}.get(cue, 4)
    if parts:  # not by mistake once more
        assert train("", tmp_path, *EVALUATION, command="eval") == 1
        assert f"resume={tmp_path / 'e'}" in (tmp_path / TEXT).read_text()
    assert train("", tmp_path, "resume=e", "seed=1", command="eval") == 1
    assert "seed=1 would change it" in (tmp_path / TEXT).read_text()
    assert train("", tmp_path, "resume=e", command="eval") == 0, (tmp_path / TEXT).read_text()
    assert (tmp_path / "e/results.csv").read_bytes() == (
        tmp_path / "once/results.csv"
    ).read_bytes()
    assert not (tmp_path / "e/partial").exists()
    assert train("", tmp_path, "resume=e", command="eval") == 1
    assert "is finished" in (tmp_path / TEXT).read_text()
