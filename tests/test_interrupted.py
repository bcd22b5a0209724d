"""Interrupted runs: after a kill or a signal, a resumed run equals an uninterrupted one."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Whole
from crash_injection import TEXT, seen, train

from diffusion_lab.runs import load_checkpoint

SCRIPT = Path(__file__).parent / "crash_injection.py"

# The run has 21 steps of one batch; an epoch has 8 batches. Validation runs every 5 batches.
RUN = [
    *TINY, "hydra.run.dir=run", "trainer.max_steps=21", "trainer.val_check_interval=5",
    "checkpoint.every_n_steps=3", "samples.every_n_steps=10", "lr_schedule.warmup=2",
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
# Crash points, see crash_injection.py. A validation has 2 batches of 8 images.
CUES = [
    "step:1", "step:2", "step:4", "step:5", "step:8", "step:9", "step:12", "step:16", "step:17",
    "step:20", "stepped:3", "stepped:8", "stepped:16", "validation:1", "validation:2",
    "validation:4", "validated:1", "validated:3", "write:1", "write:2", "write:5", "replace:1",
    "replace:3", "written:1", "written:4", "packed:1",
]  # fmt: skip
FEW = ["step:17", "write:2"]  # for the fast tests


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
        rows = [  # without measurements of speed
            {k: v for k, v in row.items() if v and not k.startswith("perf/")}
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: (int(row["step"]), sorted(row)))


def assert_same_state(directory: Path, expected: Path) -> None:
    """Asserts that two runs have the same state and used the same images in each batch."""
    actual, target = state(directory / "run"), state(expected / "run")
    assert actual.keys() == target.keys()
    for name, value in target.items():
        assert torch.equal(actual[name], value), name
    assert seen(directory) == seen(expected)


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
    assert_same_state(directory, expected)
    rows, target = metrics(run), metrics(expected / "run")
    if cue.startswith("written"):  # the checkpoint is written before the row of its step
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
def test_uninterrupted_run_uses_every_image_once_per_epoch(variant: str, whole: Whole) -> None:
    directory = whole(*RUN, *VARIANTS[variant])
    places = seen(directory)
    for epoch in (0, 1):
        ids = [k for (_, e, _), batch in places.items() if e == epoch for k in batch]
        assert sorted(ids) == list(range(64))
    assert len(places) == (21 if variant != "accumulation" else 22)
    assert sum("val/loss" in row for row in metrics(directory / "run")) == 5


@pytest.mark.parametrize("cue", FEW)
def test_killed_and_resumed_run_equals_an_uninterrupted_run(
    cue: str, whole: Whole, tmp_path: Path
) -> None:
    check(cue, "plain", whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cue", CUES)
def test_run_killed_at_any_crash_point_resumes_exactly(
    cue: str, variant: str, whole: Whole, tmp_path: Path
) -> None:
    check(cue, variant, whole, tmp_path)


@pytest.mark.slow
def test_run_killed_three_times_resumes_exactly(whole: Whole, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    expected = whole(*RUN, *VARIANTS["threads"])
    assert train("step:12", directory, *RUN, *VARIANTS["threads"]) == -9
    for cue in ("step:3", "step:5"):
        assert train(cue, directory, "resume=run") == -9
    assert train("", directory, "resume=run") == 0
    assert_same_state(directory, expected)


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
def test_killed_and_resumed_evaluation_has_the_same_table(
    whole: Whole, tmp_path: Path, cue: str
) -> None:
    """The evaluation has four groups of images, each saved in a file until the end.

    The last crash point is between writing the report and removing these files.
    """
    plain = whole(*RUN)
    (tmp_path / "run").symlink_to(plain / "run")
    (tmp_path.parent / "cache").exists() or (tmp_path.parent / "cache").symlink_to(
        plain.parent / "cache"
    )
    assert train("", tmp_path, *EVALUATION[:-2], "hydra.run.dir=once", command="eval") == 0
    assert train(cue, tmp_path, *EVALUATION, command="eval") == -9
    parts = len(list((tmp_path / "e/partial").glob("*.pt")))
    assert parts == {"computed:1": 0, "kept:1": 1, "computed:3": 2}.get(cue, 4)
    if parts:  # the same command does not start again
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


# --- signals of a cluster ------------------------------------------------------------------------


# A validation follows steps 5, 10, ...; a signal during it saves the checkpoint of the next step.
@pytest.mark.parametrize(
    ("cue", "step"),
    [
        ("step:8:SIGTERM", 8),
        *(
            pytest.param(cue, step, marks=pytest.mark.slow)
            for cue, step in (
                ("validation:2:SIGTERM", 6), ("written:1:SIGUSR1", 4), ("step:7:SIGTERM", 7),
                ("step:7:SIGUSR1", 7), ("stepped:9:SIGTERM", 9),
            )
        ),
    ],
)  # fmt: skip
def test_signal_saves_a_checkpoint_and_ends_the_run(
    cue: str, step: int, whole: Whole, tmp_path: Path
) -> None:
    directory, uninterrupted = tmp_path / "stopped", whole(*RUN)
    assert train(cue, directory, *RUN) == 0
    run, text = directory / "run", (directory / TEXT).read_text()
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == step
    assert not (run / "finished.json").exists()
    assert f"stopped by {cue.split(':')[2]} after step {step}; continue with" in text
    assert "resume=" in text and "Traceback" not in text
    assert train("", directory, "resume=run") == 0, (directory / TEXT).read_text()
    assert_same_state(directory, uninterrupted)
    assert metrics(run) == metrics(uninterrupted / "run")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [6, 7, 8, 13])  # batches 5 and 6 are those of step 3
def test_signal_between_accumulated_batches_loses_none(
    batch: int, whole: Whole, tmp_path: Path
) -> None:
    overrides = [*RUN, *VARIANTS["accumulation"], "checkpoint.every_n_steps=100"]
    directory, uninterrupted = tmp_path / "stopped", whole(*overrides)
    assert train(f"step:{batch}:SIGTERM", directory, *overrides) == 0
    run = directory / "run"
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == (batch + 1) // 2
    assert train("", directory, "resume=run") == 0, (directory / TEXT).read_text()
    assert_same_state(directory, uninterrupted)
    assert metrics(run) == metrics(uninterrupted / "run")


@pytest.mark.slow
def test_signal_in_a_validation_after_a_checkpoint_stops_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    overrides = [*RUN, "checkpoint.every_n_steps=5"]
    assert train("validation:1:SIGTERM", directory, *overrides) == 0
    run = directory / "run"
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert not any("val/loss" in row for row in metrics(run))
    assert train("", directory, "resume=run") == 0
    assert [row["step"] for row in metrics(run) if "val/loss" in row] == [
        "4", "9", "14", "19", "20"
    ]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_a_second_one_does_not(tmp_path: Path) -> None:
    """Steps are saved every 1000; the first Ctrl-C is sent in step 3, the second in step 5."""
    directory = tmp_path / "stopped"
    overrides = [*RUN, "checkpoint.every_n_steps=1000"]
    assert train("step:3:SIGINT", directory, *overrides) == 130
    text = (directory / TEXT).read_text()
    assert "press Ctrl-C again" in text and "Traceback" not in text
    assert "stopped by SIGINT after step 3; continue with: python train.py resume=" in text
    assert load_checkpoint(directory / "run/checkpoints/last.ckpt")["global_step"] == 3
    assert train("step:2:SIGINT SIGINT", directory, "resume=run") == 130
    text = (directory / TEXT).read_text()
    assert "interrupted; continue with: python train.py resume=" in text
    assert "Traceback" not in text
    assert load_checkpoint(directory / "run/checkpoints/last.ckpt")["global_step"] == 3


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("SIGTERM", "SIGINT", "SIGUSR1")]
)
def test_signal_ends_an_evaluation_and_keeps_its_results(
    name: str, whole: Whole, tmp_path: Path
) -> None:
    (tmp_path / "run").symlink_to(whole(*RUN) / "run")
    (tmp_path.parent / "cache").exists() or (tmp_path.parent / "cache").symlink_to(
        whole(*RUN).parent / "cache"
    )
    code = train(f"computed:3:{name}", tmp_path, *EVALUATION, command="eval")
    text = (tmp_path / TEXT).read_text()
    assert code == 128 + signal.Signals[name], text
    assert f"stopped by {name}; its results are kept, continue with: python eval.py" in text
    assert "Traceback" not in text and len(list((tmp_path / "e/partial").glob("*.pt"))) == 2
    assert train("", tmp_path, "resume=e", command="eval") == 0, (tmp_path / TEXT).read_text()


def test_signal_ends_a_sweep(tmp_path: Path) -> None:
    directory = tmp_path / "swept"
    overrides = [text for text in RUN if not text.startswith("hydra.run.dir")]
    code = train(
        "step:4:SIGTERM", directory, "-m", *overrides, "hydra.sweep.dir=sweep", "seed=0,1"
    )
    assert code == 0, (directory / TEXT).read_text()
    assert (directory / "sweep" / "0" / "checkpoints" / "last.ckpt").exists()
    assert not (directory / "sweep" / "1").exists()


@pytest.mark.slow
def test_two_devices_stop_at_the_same_step(tmp_path: Path) -> None:
    """The signal is sent to one process; all devices stop at the next logged step."""
    rest = [text for text in TINY if not text.startswith(("trainer.", "data.batch_size"))]
    command = [
        sys.executable, str(SCRIPT), *rest, "trainer=ddp_sim", "data.batch_size=4",
        "trainer.log_every_n_steps=4", "trainer.max_steps=100000", "hydra.run.dir=run",
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DIFFUSION_LAB_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    with open(tmp_path / TEXT, "w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not (tmp_path / "seen-1.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    text = (tmp_path / TEXT).read_text()
    assert code == 0, text
    step = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"]
    assert step > 0 and step % 4 == 0
    assert f"stopped by SIGTERM after step {step}" in text
    places = seen(tmp_path)
    assert max(b + 8 * e for r, e, b in places if r == 0) == step - 1
    assert max(b + 8 * e for r, e, b in places if r == 1) == step - 1
