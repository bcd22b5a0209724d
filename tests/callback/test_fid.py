"""Fréchet distance during training: value, steps of the measurements, no side effects."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, Command, Result

from diffusion_lab.callback import fid
from diffusion_lab.errors import SamplingError
from diffusion_lab.metric import EfficientNetLite0, Moments, extract, frechet_distance
from diffusion_lab.metric.feature_statistics import PooledPixels
from diffusion_lab.pixels import to_uint8
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.runs import load_checkpoint, rebuild
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.sampler import SEEDS

ON = [
    "fid.every_n_steps=2", "fid.num_samples=9", "fid.sampler.steps=2", "fid.batch_size=4",
    "trainer.val_check_interval=1", "hydra.run.dir=run",
    "extractor._target_=diffusion_lab.metric.feature_statistics.PooledPixels",  # fast
]  # fmt: skip
NAME = "val/frechet_pixels8_9"


def measured(directory: str = "run") -> dict[int, float]:
    """The measured distance at each step."""
    with open(Path(directory) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]) + 1: float(row[NAME]) for row in rows if row.get(NAME)}


def distance(ema: bool) -> float:
    """The distance for the last weights of the run, with all images in one batch."""
    run = rebuild("run", ema)
    generator = KeyedGenerator(make_key(0, "fid", torch.arange(9)))
    start = run.denoiser.schedule.prior((9, 3, 16, 16), generator)
    images = to_uint8(SEEDS(2, clip=True)(run.denoiser, start, generator=generator))
    data = instantiate(run.config["data"], "data")
    data.setup("fit")
    network = PooledPixels()
    drawn = extract(network, images.permute(0, 2, 3, 1))
    real = extract(network, torch.from_numpy(data.images["train"][:]))
    return frechet_distance(Moments.of(drawn), Moments.of(real))


@pytest.mark.slow
def test_fid_of_the_ema_weights_is_measured_at_the_configured_steps(
    tiny: Callable[..., Result],
) -> None:
    """It is measured at every second step and the last; a resumed run has the same values."""
    result = tiny(*ON, "trainer.max_steps=3", "optimizer.lr=0.05")
    assert result.code == 0, result.text
    found = measured()
    assert list(found) == [2, 3] and found[2] != found[3]
    averaged, raw = distance(ema=True), distance(ema=False)
    assert found[3] == pytest.approx(averaged, rel=1e-4)
    assert abs(found[3] - averaged) < 0.1 * abs(found[3] - raw)
    checkpoint = load_checkpoint(Path("run/checkpoints/last.ckpt"))
    assert checkpoint["callbacks"]["FID"] == {"measured_step": 2}  # the callback saves no weights
    assert not any("extractor" in name for name in checkpoint["state_dict"])

    again = tiny("resume=run", "trainer.max_steps=5")
    assert again.code == 0, again.text
    # The measurement at the end (step 3) stays; the others continue every 2 steps.
    later = measured()
    assert list(later) == [2, 3, 4, 5] and {k: later[k] for k in found} == found


def test_fid_is_off_by_default(
    tiny: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No extractor is created by default, so its weights may be missing."""

    def missing(network: EfficientNetLite0) -> None:
        raise AssertionError

    monkeypatch.setattr(EfficientNetLite0, "__init__", missing)
    result = tiny("trainer.max_steps=1", "hydra.run.dir=run")
    assert result.code == 0, result.text
    assert measured() == {}


def test_diverging_sampler_does_not_stop_the_training(
    tiny: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: object, **more: object) -> None:
        raise SamplingError("x_t is not finite after step 1")

    monkeypatch.setattr(SEEDS, "__call__", diverge)
    result = tiny(*ON, "trainer.max_steps=2")
    assert result.code == 0, result.text
    assert "no Fréchet distance at step 2: x_t is not finite" in result.text
    assert measured()[2] != measured()[2]
    assert Path("run/finished.json").exists()


def test_debug_run_measures_two_images_without_a_cache_file(lab: Command, tmp_path: Path) -> None:
    seen = []
    extractor = fid.extract

    def noted(network: EfficientNetLite0, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return extractor(network, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "extract", noted)
        result = lab("train", *TINY, "debug=fdr", "fid.every_n_steps=9", "fid.sampler.steps=2")
    assert result.code == 0, result.text
    assert seen == [2, 2] and not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["fid.num_samples=1"], "fid.num_samples=1 is not allowed"),
        (["fid.every_n_steps=0"], "fid.every_n_steps=0 is not allowed"),
        (["fid.sampler.steps=0"], "fid.sampler.steps=0 is not allowed"),
        (["fid.sampler.steps=1001"], "fid.sampler.steps=1001 is more than the 1000 steps"),
        (
            ["schedule=subvp", "sampler=ddim", "sampler@fid.sampler=ancestral"],
            "fid.sampler=Ancestral: anc",
        ),
        (["extractor=inception", "extractor.weights=no.pth"], "extractor.weights=no.pth is no"),
        (["extractor=vgg"], "vgg"),
        (["fid.every=3"], "fid.every"),
    ],
)
def test_invalid_options_are_an_error_before_the_first_step(
    tiny: Callable[..., Result], overrides: list[str], named: str
) -> None:
    on = ON if "extractor=inception" not in overrides else ON[:-1]
    result = tiny(*on, "trainer.max_steps=1", *overrides)
    assert result.code == 1
    assert named in result.text and "Traceback" not in result.text
    assert not Path("run/metrics.csv").exists()


def test_run_shorter_than_the_interval_is_not_measured(
    tiny: Callable[..., Result],
) -> None:
    """Thus a run of two steps of experiment=ddpm_celeba does not sample 5,000 images."""
    result = tiny(*ON, "trainer.max_steps=1")
    assert result.code == 0, result.text
    assert measured() == {} and Path("run/finished.json").exists()
