"""resume=<run dir>: merged configuration, directory, and W&B run."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import Command, Trained
from omegaconf import OmegaConf
from test_cli_train import assert_same, rows
from torch import nn

from diffusion_lab import runs
from diffusion_lab.nn.dropout import KeyedDropout
from diffusion_lab.runs import load_checkpoint


def saved(run: str) -> dict:
    return load_checkpoint(Path(run) / "checkpoints/last.ckpt")["diffusion_lab"]["config"]


def test_overrides_are_merged_into_the_configuration_of_the_run(tiny: Command) -> None:
    own = ["optimizer.lr=3e-4", "ema.decay=0.9", "name=mine", "lr_schedule=constant"]
    assert tiny(*own, "trainer.max_steps=2", "hydra.run.dir=a").code == 0
    before, text = saved("a"), Path("a/.hydra/config.yaml").read_text()
    result = tiny("resume=a", "ema.decay=0.5", "trainer.max_steps=4", "checkpoint.every_n_steps=3")
    assert result.code == 0, result.text
    after = saved("a")
    changed = {"ema": {"decay": 0.5}, "trainer": {"max_steps": 4}, "resume": "a",
               "checkpoint": {"every_n_steps": 3}, "callbacks": {}}  # fmt: skip
    expected = OmegaConf.to_container(OmegaConf.merge(before, changed))
    expected["callbacks"]["ema"]["decay"] = 0.5
    expected["callbacks"]["last"]["every_n_steps"] = 3
    assert after == expected
    assert Path("a/.hydra/config.yaml").read_text() == text
    assert Path("a/.hydra/resumed-1/overrides.yaml").exists()
    assert {p.name for p in Path().iterdir()} == {"a", "cache"}
    steps = [int(row["step"]) for row in rows(Path("a")) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]


def test_run_directory_name_can_have_special_characters(tiny: Command) -> None:
    """Sweeps can name their subdirectories after the overrides, for example."""
    name = 'lr=1e-3, it\'s a \\ (copy) é "$HOME" #1 {x}'
    assert tiny("trainer.max_steps=2", f"hydra.run.dir={name}").code == 0
    result = tiny("trainer.max_steps=2", f"hydra.run.dir={name}")
    command = re.search("already holds a run; continue it with: (.*), or choose", result.text)
    assert result.code == 1 and command, result.text
    python, script, resume = shlex.split(command[1])  # as a shell splits it
    assert (python, script) == ("python", "train.py")
    result = tiny(resume, "trainer.max_steps=3")
    assert result.code == 0, result.text
    assert load_checkpoint(Path(name) / "checkpoints/last.ckpt")["global_step"] == 3
    result = tiny(f"resume={name}", "schedule=linear", "trainer.max_steps=4")
    assert result.code == 1 and "Cosine -> diffusion_lab.schedule.Linear" in result.text


@pytest.mark.slow
def test_job_of_a_sweep_can_be_resumed(tiny: Command) -> None:
    common = ["trainer.max_steps=2", "lr_schedule=constant"]
    assert tiny("-m", *common, "schedule=linear,cosine", "hydra.sweep.dir=s").code == 0
    assert tiny("resume=s/0", "trainer.max_steps=3").code == 0
    more = ["trainer.max_steps=3", "lr_schedule=constant"]
    assert tiny(*more, "schedule=linear", "hydra.run.dir=a").code == 0
    assert_same(Path("a/checkpoints/last.ckpt"), Path("s/0/checkpoints/last.ckpt"))
    assert load_checkpoint(Path("s/1/checkpoints/last.ckpt"))["global_step"] == 2


@pytest.mark.slow
def test_resumed_run_keeps_its_wandb_id(tiny: Command) -> None:
    assert tiny("logger=wandb", "trainer.max_steps=2", "hydra.run.dir=a").code == 0
    identity = Path("a/wandb_id").read_text()
    result = tiny("resume=a", "trainer.max_steps=3")
    assert result.code == 0, result.text
    assert Path("a/wandb_id").read_text() == identity
    parts = [path.name.rpartition("-")[2] for path in Path("a/wandb").glob("offline-run-*")]
    assert set(parts) == {identity}
    assert load_checkpoint(Path("a/checkpoints/last.ckpt"))["global_step"] == 3


def test_overrides_of_a_resume_apply_to_later_resumes(trained: Trained, lab: Command) -> None:
    trained("a", "trainer.max_steps=2")
    refused = lab("train", "resume=a", "trainer.max_steps=1", "ema.decay=0.1")
    assert refused.code == 1 and "above that (now 1)" in refused.text
    assert lab("train", "resume=a", "trainer.max_steps=4", "checkpoint.every_n_steps=3").code == 0
    again = lab("train", "resume=a")
    assert again.code == 1 and "has taken 4 steps already" in again.text
    assert "(now 4)" in again.text
    assert lab("train", "resume=a", "trainer.max_steps=6").code == 0
    config = saved("a")
    assert config["checkpoint"]["every_n_steps"] == 3 and config["ema"]["decay"] != 0.1
    assert config["trainer"]["max_steps"] == 6
    asked = ["trainer.max_steps=4", "ema.decay=0.5"]  # an earlier override is recorded again
    with runs.remember_overrides(Path("a"), ["resume=a", *asked]):
        pass
    assert OmegaConf.load("a/.hydra/continued.yaml")[-2:] == asked


def test_refused_command_does_not_change_the_run(
    trained: Trained, tiny: Command, lab: Command
) -> None:
    """Hydra writes its files before the check; those of a refused command are in .hydra/refused.

    A run whose configuration file was edited to another model is also refused.
    """
    trained("a", "trainer.max_steps=2")
    record = [Path("a/.hydra", name) for name in ("config.yaml", "overrides.yaml")]
    before = [path.read_text() for path in record]
    refused = tiny("trainer.max_steps=2", "hydra.run.dir=a", "schedule=linear")
    assert refused.code == 1 and "already holds a run" in refused.text
    assert [path.read_text() for path in record] == before
    assert lab("train", "resume=a", "trainer.max_steps=3").code == 0
    for path in record:
        path.write_text(Path("a/.hydra/refused", path.name).read_text())
    result = lab("train", "resume=a", "trainer.max_steps=4")
    assert result.code == 1 and "Cosine -> diffusion_lab.schedule.Linear" in result.text
    assert load_checkpoint(Path("a/checkpoints/last.ckpt"))["global_step"] == 3


def test_resumed_run_is_not_marked_finished(
    trained: Trained, lab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("a", "trainer.max_steps=2")
    evaluated = lab("eval", "run=a", "task=generate", "hydra.run.dir=a")
    assert evaluated.code == 1 and "a holds a training" in evaluated.text
    assert Path("a/finished.json").exists()
    monkeypatch.setattr(runs, "mark_finished", lambda *_, **__: None)  # as after an interruption
    assert lab("train", "resume=a", "trainer.max_steps=3").code == 0
    assert not Path("a/finished.json").exists()


@pytest.mark.parametrize("masks", ["keyed", pytest.param("global", marks=pytest.mark.slow)])
def test_resume_with_dropout_is_exact(
    masks: str, tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of the U-Net have keys; those of a network with torch's dropout a seed per step."""
    if masks == "global":
        monkeypatch.setattr(KeyedDropout, "forward", nn.Dropout.forward)
    own = ["network.dropout=0.5", "lr_schedule=constant", "trainer.val_check_interval=100"]
    assert tiny(*own, "trainer.max_steps=3", "hydra.run.dir=a").code == 0
    assert tiny("resume=a", "trainer.max_steps=5").code == 0
    assert tiny(*own, "trainer.max_steps=5", "hydra.run.dir=b").code == 0
    assert_same(Path("a/checkpoints/last.ckpt"), Path("b/checkpoints/last.ckpt"))


def test_settings_of_the_optimizer_apply_to_a_resumed_run(trained: Trained, lab: Command) -> None:
    trained("a", "trainer.max_steps=2")
    new = ["optimizer.lr=3e-4", "optimizer.betas=[0.8,0.99]", "++optimizer.weight_decay=0.1"]
    result = lab("train", "resume=a", "trainer.max_steps=3", *new)
    assert result.code == 0, result.text
    assert "resume: optimizer.lr 0.002 -> 0.0003" in result.text
    checkpoint = load_checkpoint(Path("a/checkpoints/last.ckpt"))
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == 3e-4 and group["betas"] == (0.8, 0.99)
    assert group["weight_decay"] == 0.1
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [3e-4]
    logged = [float(row["train/lr"]) for row in rows(Path("a")) if row["train/lr"]]
    # 0.01 is the factor of the cosine at the last step.
    assert logged[-1] == pytest.approx(3e-4 * 0.01) and logged[0] == pytest.approx(2e-3)
    for override in ("optimizer=adamw", "pretrained=elsewhere"):
        refused = lab("train", "resume=a", "trainer.max_steps=4", override)
        assert refused.code == 1 and "would change" in refused.text
        assert f"  {override.split('=')[0]}" in refused.text
