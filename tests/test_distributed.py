"""Distributed training and evaluation: several processes on one CPU agree with one."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, Command
from crash_injection import seen
from lightning import Callback, LightningModule, Trainer
from test_module import make_batch, make_module
from torch.utils.data import DataLoader, Dataset

from diffusion_lab.callback import LastCheckpoint
from diffusion_lab.nn import UNet
from diffusion_lab.runs import load_checkpoint
from diffusion_lab.runs.ranks import set_up_ddp

ROOT = Path(__file__).parent.parent
OWN = ("data.splits", "data.batch_size", "trainer.accelerator")  # set by the tests
SPLITS = "data.splits={train: 64, val: 15, test: 15}"


def command(script: str, *overrides: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *overrides],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def train_and_record(tmp_path: Path, *overrides: str) -> None:
    """Runs train.py in a separate process and records the images of each rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "crash_injection.py"
    result = subprocess.run(
        [sys.executable, str(script), *overrides],
        cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("drop_last", "order"),
    [(False, "shuffle"), (True, "interleave")],
)
@pytest.mark.slow
def test_run_can_be_resumed_with_another_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop_last: bool, order: str
) -> None:
    """The run has 2, 1, then 3 devices with 4 images each; both changes are in the first epoch."""
    monkeypatch.setenv("DIFFUSION_LAB_CACHE", str(tmp_path / "cache"))
    tiny = [text for text in TINY if not text.startswith(OWN)]
    splits = "data.splits={train: 62, val: 16, test: 16}"
    train_and_record(
        tmp_path, *tiny, splits, "trainer=ddp_sim", "data.batch_size=4",
        f"data.drop_last={drop_last}", f"data.order={order}", "data.interleave=2",
        "trainer.max_steps=3", "hydra.run.dir=run",
        "trainer.val_check_interval=2",
    )  # fmt: skip
    train_and_record(tmp_path, "resume=run", "trainer.devices=1", "trainer.max_steps=6")
    train_and_record(tmp_path, "resume=run", "trainer.devices=3", "trainer.max_steps=16")
    places = seen(tmp_path)
    epochs: dict[int, list[int]] = {}
    for (_, epoch, _), ids in sorted(places.items()):
        epochs.setdefault(epoch, []).extend(ids)
    first, second = sorted(epochs[0]), sorted(epochs[1])
    assert len(set(first)) == len(first) and len(set(second)) == len(second)
    if not drop_last:  # batches: 3 x 8, 3 x 4, 12 + 7 + 7; then 4 x 12 + 7 + 7
        assert first == second == list(range(62))
    else:  # batches: 3 x 8, 3 x 4, 12 + 12; then 5 x 12
        assert (len(first), len(second)) == (60, 60)
    # The ranks share each batch equally, up to one image, and every rank has at least one.
    sizes: dict[tuple[int, int], list[int]] = {}
    for (_, epoch, batch), ids in places.items():
        sizes.setdefault((epoch, batch), []).append(len(ids))
    assert all(max(each) - min(each) <= 1 and min(each) > 0 for each in sizes.values())
    rows = [row for row in read_rows(tmp_path / "run/metrics.csv") if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(16))


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_losses_of_two_processes_equal_those_of_one(lab: Command, steps: int) -> None:
    """An epoch has 8 steps; the devices share the 5 images of its last batch unequally."""
    tiny = [text for text in TINY if not text.startswith(OWN)]
    splits = "data.splits={train: 61, val: 15, test: 15}"
    common = [*tiny, splits, "data.drop_last=false", "optimizer.lr=2e-4"]
    common.append(f"trainer.max_steps={steps}")
    for trainer in (
        ["trainer=cpu", "data.batch_size=8", "hydra.run.dir=one"],
        ["trainer=ddp_sim", "data.batch_size=4", "hydra.run.dir=two"],
    ):
        result = lab("train", *common, *trainer)
        assert result.code == 0, result.text
    one, two = (
        [
            float(row["train/loss"])
            for row in read_rows(Path(d) / "metrics.csv")
            if row["train/loss"]
        ]
        for d in ("one", "two")
    )
    assert len(one) == steps and len(set(one)) == steps
    assert two == pytest.approx(one, rel=1e-6)


def last_row(path: str) -> dict[str, float]:
    with open(path, newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return {name: float(value) for name, value in row.items() if value}


@pytest.mark.slow
def test_training_and_evaluation_agree_with_one_and_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    denoising = [[], ["num_images=1"]]  # with one image, one rank has none
    restorations = [
        ["task=inpaint_box", "guidance=tds", f"guidance.share_particles={shares}"]
        for shares in ("true", "false")
    ]
    for options in (*denoising, *restorations, ["task=deblur", "guidance=mmps"]):
        command("eval.py", *small, *options, "trainer=cpu", "hydra.run.dir=e1")
        command("eval.py", *small, *options, "trainer=ddp_sim", "hydra.run.dir=e2")
        rows = []
        for directory in ("e1", "e2"):
            with open(f"{directory}/results.csv", newline="") as file:
                rows.append(list(csv.DictReader(file)))
        for a, b in zip(*rows, strict=True):
            assert (a["estimate"], a["metric"], a["n"]) == (b["estimate"], b["metric"], b["n"])
            mean = pytest.approx(float(a["mean"]), rel=1e-5, abs=1e-6, nan_ok=True)
            assert float(b["mean"]) == mean, (options, a["estimate"], a["metric"])
        shutil.rmtree("e1")
        shutil.rmtree("e2")


class RecordCommunication(Callback):
    """Records the communication between devices, and saves the final weights."""

    def __init__(self, path: Path) -> None:
        self.path, self.batch = path, 0
        self.buckets: list[tuple[int, int]] = []  # batch, bytes
        self.others: list[tuple[int, str]] = []  # batch, collective

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        def summed(_, bucket):  # torch requires its own annotations or none
            gradients = bucket.buffer()
            self.buckets.append((self.batch, gradients.numel() * gradients.element_size()))
            work = torch.distributed.all_reduce(gradients.div_(2), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        trainer.strategy.model.register_comm_hook(None, summed)
        for name in ("broadcast", "_broadcast_coalesced", "all_gather", "barrier"):
            self._watch(name)

    def _watch(self, name: str) -> None:
        call = getattr(torch.distributed, name)

        def noted(*arguments, **keywords):
            self.others.append((self.batch, name))
            return call(*arguments, **keywords)

        setattr(torch.distributed, name, noted)  # in a process that ends with the training

    def on_train_batch_end(self, *_) -> None:
        self.batch += 1

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            weights = {k: p.detach() for k, p in module.network.named_parameters()}
            facts = {"buckets": self.buckets, "others": self.others, "weights": weights}
            torch.save(facts, self.path)


class SharedBatches(Dataset):
    """Batches of eight images, of which each of two devices has four."""

    def __init__(self, world: int) -> None:
        self.world = world

    def __len__(self) -> int:
        return 8

    def __getitem__(self, k: int) -> dict:
        rank = torch.distributed.get_rank() if self.world > 1 else 0
        return make_batch(8 // self.world, 8 * k + 4 * rank)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro", [1, 2])
def test_only_gradients_are_communicated_and_once_per_step(tmp_path: Path, micro: int) -> None:
    """The last micro-batch sends 4 bytes per parameter; the weights equal those of one device."""

    def trained(name: str, world: int) -> dict:
        torch.manual_seed(0)
        network = UNet(8, (1, 2), 1, (1,), groups=4, checkpointing=True)
        module = make_module(network)
        callbacks = [LastCheckpoint(str(tmp_path / name), 1000)]
        if world > 1:
            set_up_ddp(micro, start_method="fork")
            callbacks.append(RecordCommunication(tmp_path / f"{name}.pt"))
        trainer = Trainer(
            accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto",
            use_distributed_sampler=False, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, max_steps=4, limit_val_batches=0,
            accumulate_grad_batches=micro, log_every_n_steps=1000,
        )  # fmt: skip
        set_up_ddp(1)
        trainer.fit(module, DataLoader(SharedBatches(world), batch_size=None))
        if world > 1:
            return torch.load(tmp_path / f"{name}.pt")
        return {"weights": {k: p.detach() for k, p in network.named_parameters()}}

    two, one = trained("two", 2), trained("one", 1)
    size = 4 * sum(weight.numel() for weight in one["weights"].values())
    assert two["buckets"] == [((k + 1) * micro - 1, size) for k in range(4)]
    assert [other for other in two["others"] if other[0] < 4 * micro - 1] == []
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)
