"""Configuration: every option composes, every key has a comment, every experiment runs."""

import re
from pathlib import Path

import pytest
from conftest import Command
from hydra.errors import HydraException
from omegaconf import OmegaConf

from diffusion_lab.command.validation import check_eval
from diffusion_lab.runs import compose
from diffusion_lab.runs.compose import CONFIG_PATH

CONF = Path(CONFIG_PATH)
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name != "local"
]
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]


@pytest.mark.parametrize("option", ["sampler", "trainer", "launcher"])
def test_groups_shared_by_both_commands_are_valid_in_eval(option: str) -> None:
    """test_validation.py composes the options of these groups for a training only."""
    for group, name in OPTIONS:
        if group == option:
            check_eval(compose("eval", [f"{group}={name}", "++paths.output_dir=out"]))


def test_no_mandatory_value_is_missing() -> None:
    for command in ("train", "eval"):
        config = compose(command, ["++paths.output_dir=out"])
        assert OmegaConf.missing_keys(config) == set()


def test_task_selects_its_method_and_method_selects_its_sampler() -> None:
    def choice(*overrides: str) -> tuple[str, str]:
        config = compose("eval", list(overrides))
        guidance = config.guidance._target_.rsplit(".", 1)[1] if config.guidance else None
        return guidance, config.sampler._target_.rsplit(".", 1)[1]

    assert choice("task=denoise") == ("TruncatedReverseSDE", "EulerMaruyama")
    assert choice("task=generate") == (None, "Ancestral")
    assert choice("task=denoise", "guidance=residual") == ("Residual", "Ancestral")
    assert choice("guidance=residual", "sampler=ddim") == ("Residual", "DDIM")
    assert choice("sampler=ancestral") == ("TruncatedReverseSDE", "Ancestral")


def test_command_line_overrides_the_experiment() -> None:
    config = compose("train", ["experiment=ddpm_celeba", "schedule=cosine", "trainer=ddp"])
    assert config.schedule._target_.endswith("Cosine")
    assert config.trainer.strategy == "ddp"
    assert config.trainer.max_steps == 500000  # from the experiment, not from the trainer


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert any(line.startswith("# ") for line in lines[:2]), (
        "the file does not start with a description"
    )
    for line in lines:
        key = re.match(r"\s*([a-z_0-9]+): *\S", line)
        assert not key or key[1] in ("_target_", "_partial_") or " # " in line, line


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(experiment: str, full: bool, lab: Command, tmp_path: Path) -> None:
    """The network is tiny, the sampler has two steps, and each loop has one batch.

    If full, the experiment keeps its image size and number of images.
    """
    overrides = ["data.batch_size=1", "sampler.steps=2", "samples.num_samples=1"]
    if experiment.endswith("celeba"):
        make_photos(tmp_path / "photos", 12, 256 if full else 32)
        overrides += [
            f"data.source={tmp_path / 'photos'}",
            "data.splits.val=0.3",
            "data.splits.test=0.3",
            *([] if full else ["data.size=32"]),
        ]
    elif not full:
        overrides.append("data.splits={train: 64, val: 16, test: 16}")
    result = lab(
        "train",
        f"experiment={experiment}",
        "debug=fdr",
        "network=unet_tiny",
        "trainer.accelerator=cpu",
        *overrides,
    )
    assert result.code == 0, result.text
    assert not (tmp_path / "outputs" / "train").exists(), "a debug run is in the directory of runs"


def make_photos(folder: Path, count: int, size: int) -> None:
    """Writes crops of photographs from scikit-image as JPEG and PNG files."""
    from PIL import Image
    from skimage import data

    folder.mkdir()
    photos = [Image.fromarray(image) for image in (data.astronaut(), data.coffee(), data.cat())]
    for k in range(count):
        photo = photos[k % 3]
        room = min(photo.size) - size
        left, top = (37 * k) % (room + 1), (53 * k) % (room + 1)
        suffix = "png" if k % 4 == 0 else "jpg"
        photo.crop((left, top, left + size, top + size)).save(folder / f"{k:03d}.{suffix}")


def test_misspelled_key_or_option_is_refused() -> None:
    with pytest.raises(HydraException, match="schedul"):
        compose("train", ["schedule=liner"])
    with pytest.raises(HydraException, match="max_step"):
        compose("train", ["trainer.max_step=3"])
