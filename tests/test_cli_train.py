"""Training command: new runs, resumed runs, and error messages."""

import csv
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Command, Trained, find_refusal, run_command
from test_conf import make_photos

from diffusion_lab import load_run
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.runs import load_checkpoint

TRAIN = Path(__file__).parent.parent / "train.py"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """State that a resumed run shares with an uninterrupted one: weights and optimizer."""
    checkpoint = load_checkpoint(path)
    state = checkpoint["optimizer_states"][0]["state"]
    moments = {f"{k}.{n}": v for k, each in state.items() for n, v in each.items()}
    return checkpoint["state_dict"] | moments


def assert_same(one: Path, two: Path) -> None:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_run_directory_has_all_files_and_metrics(tiny: Command) -> None:
    result = tiny("trainer.max_steps=6", "hydra.run.dir=a")
    assert result.code == 0, result.text
    run = Path("a")
    for name in (
        ".hydra/config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv",
        "samples/grid-0000006.png", "samples/denoise-0000006.png", "finished.json",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    logged = rows(run)
    train = [float(row["train/loss"]) for row in logged if row["train/loss"]]
    assert len(train) == 6
    assert 0.5 < train[0] < 2  # a new network predicts 0 for noise of variance 1
    last = logged[-1]
    assert float(last["val/loss"]) != float(last["val/loss_ema"])
    assert sum(bool(last[f"val/loss_bin/{k / 10:.1f}"]) for k in range(1, 11)) == 10


def test_load_run_returns_the_averaged_network(tiny: Command) -> None:
    tiny("trainer.max_steps=4", "hydra.run.dir=a", "optimizer.lr=0.01")
    weights = load_checkpoint(Path("a/checkpoints/last.ckpt"))["state_dict"]
    averaged, raw = load_run("a"), load_run("a/checkpoints/last.ckpt", ema=False)
    name = "conv_in.weight"
    assert torch.equal(averaged.network.state_dict()[name], weights[f"network_ema.{name}"])
    assert torch.equal(raw.network.state_dict()[name], weights[f"network.{name}"])
    assert not torch.equal(averaged.network.state_dict()[name], raw.network.state_dict()[name])
    x = KeyedGenerator(make_key(0, torch.arange(2))).normal(3, 8, 8)
    t = torch.tensor(0.5)
    alpha_t, sigma_t = averaged.schedule(t)
    with torch.no_grad():
        epsilon = averaged.network(x, 499.0)
    assert torch.allclose(averaged(x, t), (x - sigma_t * epsilon) / alpha_t, atol=1e-5)
    assert not averaged.training


# The run stops in the middle of an epoch of 8 batches, or at its end.
@pytest.mark.parametrize("stop", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_resumed_run_equals_an_uninterrupted_run(
    tiny: Command, trained: Trained, stop: int
) -> None:
    common = ["trainer.val_check_interval=3", "lr_schedule=constant", "lr_schedule.warmup=0"]
    trained("a", *common, "trainer.max_steps=11")
    tiny(*common, f"trainer.max_steps={stop}", "hydra.run.dir=b")
    result = tiny("resume=b", "trainer.max_steps=11")
    assert result.code == 0, result.text
    assert_same(Path("a/checkpoints/last.ckpt"), Path("b/checkpoints/last.ckpt"))
    losses = [[r["train/loss"] for r in rows(Path(d)) if r["train/loss"]] for d in "ab"]
    assert losses[0] == losses[1]
    assert Path("b/.hydra/resumed-1/config.yaml").is_file()


@pytest.mark.slow
def test_run_with_gradient_accumulation_resumes_exactly(tiny: Command) -> None:
    common = ["trainer.accumulate_grad_batches=2", "lr_schedule=constant", "lr_schedule.warmup=0"]
    tiny(*common, "trainer.max_steps=7", "hydra.run.dir=a")
    tiny(*common, "trainer.max_steps=3", "hydra.run.dir=b")
    tiny("resume=b", "trainer.max_steps=7")
    assert_same(Path("a/checkpoints/last.ckpt"), Path("b/checkpoints/last.ckpt"))


@pytest.mark.slow
def test_killed_run_resumes_exactly(tiny: Command, tmp_path: Path) -> None:
    common = ["trainer.max_steps=40", "checkpoint.every_n_steps=5", "sampler.steps=1"]
    tiny(*common, "hydra.run.dir=a")
    command = [sys.executable, str(TRAIN), *TINY, *common, "hydra.run.dir=b"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums depend on it
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread
    )
    checkpoint = Path("b/checkpoints/last.ckpt")
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(checkpoint)["global_step"] <= 40
    if not Path("b/finished.json").exists():
        result = tiny("resume=b")
        assert result.code == 0, result.text
    assert_same(Path("a/checkpoints/last.ckpt"), checkpoint)


def test_full_disk_keeps_the_previous_checkpoint(trained: Trained) -> None:
    """RLIMIT_FSIZE simulates a full disk: writes beyond this file size fail."""
    trained("a", "trainer.max_steps=2")
    checkpoint = Path("a/checkpoints/last.ckpt")
    before = checkpoint.read_bytes()

    def command() -> None:
        os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
        sys.exit(run_command("train", "resume=a", "trainer.max_steps=4"))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    process.join(120)
    assert process.exitcode == 1
    text = Path("stderr.txt").read_text()
    assert "cannot write the checkpoint" in text
    assert "resume=" in text
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("*.partial"))


@pytest.mark.slow
def test_each_job_of_a_sweep_has_a_directory(tiny: Command) -> None:
    result = tiny("-m", "schedule=linear,cosine", "trainer.max_steps=2", "hydra.sweep.dir=s")
    assert result.code == 0, result.text
    kinds = {type(load_run(f"s/{job}").schedule).__name__ for job in (0, 1)}
    assert kinds == {"Linear", "Cosine"}


def test_wandb_works_offline_without_an_account(tiny: Command) -> None:
    result = tiny("logger=wandb", "trainer.max_steps=2", "hydra.run.dir=a")
    assert result.code == 0, result.text
    pictures = list(Path("a/wandb").glob("offline-run-*/files/media/images/samples/*.png"))
    names = {"grid", "progressive", "nearest", "denoise", "levels"}
    assert {p.name.split("_")[0] for p in pictures} == names
    assert Path("a/wandb_id").read_text() in next(Path("a/wandb").glob("offline-run-*")).name
    assert len(rows(Path("a"))) >= 2


BAD = [
    ("trainer.max_steps=abc", "trainer.max_steps=abc", "integer"),
    ("trainer.max_steps=0", "trainer.max_steps=0", "integer"),
    ("data.batch_size=0", "data.batch_size=0", "integer >= 1"),
    ("data.batch_size=2.5", "data.batch_size=2.5", "integer >= 1"),
    ("data.size=9", "data.size=9", "power of two"),
    ("data.size=12", "data.size=12", "power of two"),
    ("network.multipliers=3", "network.multipliers=3", "a list"),
    ("network.attention_levels=[7]", "attention_levels=[7]", "levels 0 to 1"),
    ("network.groups=3", "groups=3", "divisor of channels=8"),
    ("optimizer.lr=nan", "optimizer.lr=nan", "a number > 0"),
    ("ema.decay=1", "ema.decay=1", "[0, 1)"),
    (
        "schedule=ve schedule.sigma_max=0.5 sampler=euler_maruyama",
        "VE has noise levels σ/α from 0.01 to 0.4999",
        "~callbacks.samples",
    ),
    (
        "schedule=ve schedule.sigma_min=0.6 sampler=euler_maruyama",
        "VE has noise levels σ/α from 0.6 to 348",
        "~callbacks.samples",
    ),
    ("sampler.steps=2000", "sampler.steps=2000", "1000 steps"),
    ("sampler=ddim sampler.eta=2", "sampler.eta=2", "[0, 1]"),
    ("schedule=linear schedule.beta_max=1", "schedule.beta_max=1", "(0, 1)"),
    ("schedule=linear schedule.beta_min=0.5", "beta_min=0.5", "below"),
    ("trainer.devices=0", "trainer.devices=0", ">= 1"),
    ("seed=-1", "seed=-1", ">= 0"),
    ("schedule.s=-1", "schedule.s=-1", "a number > 0"),
    ("trainer.max_step=5", "max_step", "trainer"),
]
BAD_BY_COMMAND = [  # one case of each kind in BAD, and errors that only the command detects
    ("optimizer.lr=-1", "optimizer.lr=-1", "a number > 0"),
    ("schedule=liner", "schedule/liner", "linear"),
    ("data.batch_size=65", "data.batch_size=65", "the 64 training images"),
    ("data.source=nowhere", "data.source=nowhere", "does not exist"),
    ("resume=nowhere", "resume=nowhere", "does not exist"),
]


@pytest.mark.parametrize(("override", "named", "hint"), BAD, ids=[b[0] for b in BAD])
def test_invalid_value_is_named_with_a_hint(override: str, named: str, hint: str) -> None:
    message = find_refusal("train", *TINY, *override.split())
    assert named in message
    assert hint in message


@pytest.mark.parametrize(
    ("override", "named", "hint"), BAD_BY_COMMAND, ids=[b[0] for b in BAD_BY_COMMAND]
)
def test_refused_command_shows_only_the_message(
    tiny: Command, override: str, named: str, hint: str
) -> None:
    result = tiny(*override.split(), "hydra.run.dir=a")
    assert result.code == 1
    assert named in result.text
    assert hint in result.text
    assert "Traceback" not in result.text
    assert not Path("a/checkpoints").exists()


def test_validation_interval_longer_than_an_epoch_is_named(tiny: Command) -> None:
    result = tiny("trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1000")
    assert result.code == 1 and "Traceback" not in result.text
    assert "trainer.val_check_interval=1000 is more than the batches of one epoch" in result.text


def test_unknown_metric_of_the_best_checkpoint_is_named(tiny: Command) -> None:
    result = tiny("callbacks.best.monitor=val/los", "trainer.max_steps=1")
    assert result.code == 1 and "Traceback" not in result.text
    assert "val/los" in result.text and "val/loss_ema" in result.text


def test_directory_that_contains_a_run_is_refused(tiny: Command, trained: Trained) -> None:
    trained("a", "trainer.max_steps=2")
    before = Path("a/checkpoints/last.ckpt").read_bytes()
    result = tiny("trainer.max_steps=2", "hydra.run.dir=a")
    assert result.code == 1
    assert "resume=" in result.text
    assert Path("a/checkpoints/last.ckpt").read_bytes() == before


def test_resume_with_another_model_shows_the_difference(tiny: Command, trained: Trained) -> None:
    trained("a", "trainer.max_steps=2")
    result = tiny("resume=a", "schedule=linear", "trainer.max_steps=4")
    assert result.code == 1
    assert "schedule._target_: diffusion_lab.schedule.Cosine -> diffusion_lab.schedule.Linear" in (
        result.text
    )


def test_resume_on_other_images_is_refused(tiny: Command, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 40, 16)
    shares = "data.splits={train: 0.6, val: 0.2, test: 0.2}"
    common = [f"data.source={tmp_path / 'photos'}", shares, "hydra.run.dir=a"]
    assert tiny(*common, "trainer.max_steps=2").code == 0
    saved = load_checkpoint(Path("a/checkpoints/last.ckpt"))["ImageDataModule"]["splits"]
    hashes = {each[kind] for each in saved.values() for kind in ("names", "content")}
    assert len(hashes) == 6
    (tmp_path / "photos" / "new.png").write_bytes((tmp_path / "photos" / "000.png").read_bytes())
    result = tiny("resume=a", "trainer.max_steps=4")
    assert result.code == 1
    assert any(value in result.text for value in hashes)
    assert "added, removed, renamed" in result.text and "Traceback" not in result.text


def test_resume_with_another_seed_or_order_shows_both(tiny: Command, trained: Trained) -> None:
    trained("a", "trainer.max_steps=2")
    for override, shown in (
        ("seed=1", "seed: 0 -> 1"),
        ("data.order=interleave", "shuffle -> interleave"),
    ):
        result = tiny("resume=a", override, "trainer.max_steps=4")
        assert result.code == 1
        assert shown in result.text and "Traceback" not in result.text


def test_resume_on_the_same_images_in_another_folder_is_allowed(
    tiny: Command, tmp_path: Path
) -> None:
    make_photos(tmp_path / "photos", 40, 16)
    shares = "data.splits={train: 0.6, val: 0.2, test: 0.2}"
    common = [f"data.source={tmp_path / 'photos'}", shares, "lr_schedule=constant"]
    common += ["lr_schedule.warmup=0"]
    assert tiny(*common, "trainer.max_steps=4", "hydra.run.dir=a").code == 0
    assert tiny(*common, "trainer.max_steps=2", "hydra.run.dir=b").code == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    result = tiny("resume=b", f"data.source={tmp_path / 'moved'}", "trainer.max_steps=4")
    assert result.code == 0, result.text
    assert_same(Path("a/checkpoints/last.ckpt"), Path("b/checkpoints/last.ckpt"))


def test_resume_of_a_finished_run_names_trainer_max_steps(tiny: Command, trained: Trained) -> None:
    trained("a", "trainer.max_steps=2")
    result = tiny("resume=a")
    assert result.code == 1
    assert "trainer.max_steps" in result.text


def test_folder_without_images_and_corrupt_image_are_named(tiny: Command, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    source = [f"data.source={folder}", "data.splits={train: 0.6, val: 0.2, test: 0.2}"]
    result = tiny(*source)
    assert result.code == 1
    assert str(folder) in result.text and "no image" in result.text
    for k in range(12):
        Image.new("RGB", (16, 16), (20 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    result = tiny(*source)
    assert result.code == 1
    assert str(folder / "7.png") in result.text
    assert "data.on_error=skip" in result.text
    assert not list((tmp_path / "cache").glob("*/manifest.json")), "an incomplete cache is used"
    result = tiny(*source, "data.on_error=skip", "data.batch_size=2", "trainer.max_steps=1")
    assert result.code == 0, result.text
    assert f"skipped: {folder / '7.png'}" in result.text


@pytest.mark.slow
def test_full_network_trains_on_photographs_and_resumes(lab: Command, tmp_path: Path) -> None:
    """experiment=ddpm_celeba unchanged: 113.7 M parameters, 256x256 images read from disk."""
    torch.set_num_threads(os.cpu_count() or 1)
    make_photos(tmp_path / "photos", 30, 256)
    common = [
        "experiment=ddpm_celeba", f"data.source={tmp_path / 'photos'}", "data.batch_size=1",
        "data.splits={train: 0.8, val: 0.1, test: 0.1}", "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1", "samples.num_samples=1", "sampler.steps=1",
    ]  # fmt: skip
    result = lab("train", *common, "trainer.max_steps=2", "hydra.run.dir=a")
    assert result.code == 0, result.text
    checkpoint = load_checkpoint(Path("a/checkpoints/last.ckpt"))
    weights = [v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")]
    assert sum(w.numel() for w in weights) == 113_673_219
    result = lab("train", "resume=a", "trainer.max_steps=3")
    assert result.code == 0, result.text
    assert load_checkpoint(Path("a/checkpoints/last.ckpt"))["global_step"] == 3
    losses = [float(row["train/loss"]) for row in rows(Path("a")) if row["train/loss"]]
    assert len(losses) == 3
    assert all(0.9 < loss < 1.1 for loss in losses)  # the learning rate is 2e-5 with warm-up
    torch.set_num_threads(1)
