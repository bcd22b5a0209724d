"""Evaluation command: tables, images and reports of a run, and rejected input."""

import csv
import math
import os
import pickle
import re
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, Command, Trained, find_refusal
from image_fixtures import fill
from PIL import Image

from diffusion_lab import load_run
from diffusion_lab.interop.diffusers import save_unet
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.task.interpolate import slerp

SMALL = ["num_images=5", "num_samples=3", "sampler.steps=3", "trainer.accelerator=cpu"]


def table(directory: str) -> dict[tuple[str, str], tuple[float, float, int]]:
    with open(Path(directory) / "results.csv", newline="") as file:
        return {
            (row["estimate"], row["metric"]): (
                float(row["mean"]), float(row["stderr"]), int(row["n"])
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def test_denoise_writes_a_table_images_and_a_report(lab: Command, run: Path) -> None:
    result = lab("eval", "task=denoise", "sigma_t=0.5", "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    results = table("e")
    restored = {key for key in results if key[1] in ("psnr", "ssim")}
    assert {e for e, _ in restored} == {"noisy", "sample", "mean", "mmse"}
    assert all(n == 5 for _, _, n in results.values())
    assert all(results[key][1] > 0 for key in restored)
    assert results["sample", "nonfinite"][0] == 0
    for metric in ("crps", "energy_score", "coverage_90", "spread_skill", "rank_chi2_pixels"):
        assert 0 < results["posterior", metric][0] < 1e4
    # After three training steps the network is nearly random, so the coverage is low.
    assert results["posterior", "coverage_90"][0] <= 0.5  # the ideal value for 3 samples
    # y = x_0 + 0.577 n has an expected PSNR of 10 log10(4 / 0.577²) = 10.79 dB
    assert results["noisy", "psnr"][0] == pytest.approx(10.79, abs=0.3)
    for name in ("grid", "denoising", "diffusion"):
        with Image.open(f"e/samples/{name}.png") as picture:
            assert min(picture.size) >= 128
    for text in ("sigma_t = 0.5", "t = 0.3281", "sigma_y = 0.5774", "snr_db = 4.771"):
        assert text in result.text
    page = Path("e/report.html").read_text()
    assert f"{results['mmse', 'psnr'][0]:.3f}" in page
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_noise_of_the_measurement_depends_on_seed_and_image_index(lab: Command, run: Path) -> None:
    """The PSNR of y is 10 log10(4 / mean((σ_y n)²)) with the noise n of (seed, image index)."""
    lab("eval", "sigma_y=0.3", "seed=7", "hydra.run.dir=e", *SMALL)
    noise = KeyedGenerator(make_key(7, "observation", torch.arange(5))).normal(3, 16, 16)
    psnr = 10 * torch.log10(4 / (0.3 * noise).square().flatten(1).mean(1))
    assert table("e")["noisy", "psnr"][0] == pytest.approx(float(psnr.mean()), abs=1e-3)


def test_results_do_not_depend_on_the_batch_size(lab: Command, run: Path) -> None:
    for size in (1, 4, 64):
        result = lab("eval", f"batch_size={size}", f"hydra.run.dir=e{size}", *SMALL)
        assert result.code == 0, result.text
    for key, (mean, _, _) in table("e1").items():
        assert table("e4")[key][0] == pytest.approx(mean, rel=1e-5)
        assert table("e64")[key][0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("guidance", ["truncated", "mmse", "residual"])
def test_every_denoising_method_runs(lab: Command, run: Path, guidance: str) -> None:
    steps = ["sampler.steps=1"] if guidance == "mmse" else []
    result = lab("eval", f"guidance={guidance}", "hydra.run.dir=e", *SMALL, *steps)
    assert result.code == 0, result.text
    results = table("e")
    if guidance == "mmse":  # its only sample is the estimate itself
        assert results["sample", "psnr"] == pytest.approx(results["mmse", "psnr"])
    else:
        assert results["sample", "psnr"][0] != results["mmse", "psnr"][0]


def test_generate_writes_the_images(lab: Command, run: Path) -> None:
    common = ["task=generate", "num_samples=5", "sampler.steps=2", "trainer.accelerator=cpu"]
    for size in (2, 64):
        result = lab("eval", *common, f"batch_size={size}", f"hydra.run.dir=g{size}")
        assert result.code == 0, result.text
    images = np.load("g64/samples.npy")
    assert images.dtype == np.uint8 and images.shape == (5, 16, 16, 3)
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    difference = images.astype(int) - np.load("g2/samples.npy").astype(int)
    assert abs(difference).max() <= 1  # due to rounding
    assert Path("g64/report.html").is_file() and Path("g64/samples/grid.png").is_file()


def test_newest_finished_run_is_the_default(lab: Command, run: Path, trained: Trained) -> None:
    newest = trained("outputs/train/other/x", "trainer.max_steps=2")
    now = time.time()
    for path, age in ((run, 60), (newest, 30)):
        os.utime(path / "finished.json", (now - age, now - age))
    trained("elsewhere", "trainer.max_steps=2")
    few = ["num_images=1", "num_samples=2", "sampler.steps=1", "trainer.accelerator=cpu"]
    result = lab("eval", *few)
    assert "outputs/train/other/x" in result.text
    Path("outputs/train/other/x/finished.json").unlink()
    assert str(run) in lab("eval", *few).text
    assert "elsewhere" in lab("eval", "run=elsewhere", *few).text
    result = lab("eval", "ckpt=elsewhere/checkpoints/best.ckpt", *few)
    assert result.code == 0 and "best.ckpt" in result.text


def test_missing_run_is_an_error_that_names_the_training_command(lab: Command) -> None:
    result = lab("eval", "task=denoise", "sigma_t=0.5")
    assert result.code == 1
    assert "python train.py" in result.text and "Traceback" not in result.text


BAD = [
    (["sigma_t=0.5", "t=0.5"], "sigma_t=0.5 and t=0.5"),
    (["sigma_t=1"], "sigma_t=1 is not allowed; it must be null or a number in (0, 1)"),
    (["sigma_t=0"], "sigma_t=0 is not allowed"),
    (["sigma_t=abc"], "sigma_t=abc is not allowed; it must be null or a number in (0, 1)"),
    (["t=1.5"], "t=1.5 is not allowed"),
    (["sigma_y=-1"], "sigma_y=-1 is not allowed"),
    (["sigma_tt=0.5"], "sigma_tt"),
    (["task=denose"], "task/denose"),
    (["task=generate", "sigma_t=0.5"], "sigma_t"),
    (["num_images=0"], "num_images=0"),
    (["guidance=residual", "guidance.gain=-1"], "guidance.gain=-1"),
    (["guidance=none"], "guidance=none"),
    (["run=a", "ckpt=b"], "exclude each other"),
    (["run=a", "model=pretrained", "model.path=b"], "run=a and model.path=b exclude each other"),
    (["schedule=ve", "schedule.sigma_min=9", "schedule.sigma_max=1"], "must be below"),
    (["sampler=heun", "sampler/grid=karras", "sampler.grid.rho=0"], "sampler.grid.rho=0"),
]
BAD_BY_COMMAND = [  # one case of each kind in BAD, and errors that only the command detects
    (["sigma_t=0.5", "t=0.25"], "sigma_t=0.5 and t=0.25"),
    (["sampler=ddmi"], "sampler/ddmi"),
    (["model=pretrained"], "needs model.path=<folder>"),
    (["model=pretrained", "model.path=nowhere"], "there is no config.json in nowhere"),
    (["run=nowhere"], "nowhere does not exist"),
]


@pytest.mark.parametrize(("overrides", "named"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_invalid_value_is_named(overrides: list[str], named: str) -> None:
    assert named in find_refusal("eval", *overrides)


@pytest.mark.parametrize(
    ("overrides", "named"), BAD_BY_COMMAND, ids=[" ".join(b[0]) for b in BAD_BY_COMMAND]
)
def test_refused_command_shows_only_the_message(
    lab: Command, overrides: list[str], named: str
) -> None:
    """The error occurs before the command searches for a run; none exists here."""
    result = lab("eval", *overrides)
    assert result.code == 1
    assert named in result.text
    assert "Traceback" not in result.text


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sigma_t=0.9999999999"], "outside the run's schedule"),
        (["sigma_y=1e-4"], "outside the run's schedule"),
        (["num_images=1000"], "16 test images"),
        (["sampler.steps=1001"], "1000 steps"),
        (["schedule=subvp", "sampler=ancestral"], "the sub-VP SDE has none"),
        (
            ["schedule=ve", "schedule.sigma_max=30000"],
            "σ/α = 3e+04; the prior was trained under Cosine, up to 2.029e+04",
        ),
        (["task=likelihood", "sampler=ddim"], "set sampler=probability_flow"),
        (["task=interpolate", "num_images=9"], "num_images=18 is more than the 16 test images"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_named(
    lab: Command, run: Path, overrides: list[str], named: str
) -> None:
    result = lab("eval", *overrides)
    assert result.code == 1
    assert named in result.text and "Traceback" not in result.text


def test_likelihood_writes_bits_per_dimension(lab: Command, run: Path) -> None:
    """The values are in a plausible range, and do not depend on the batch size."""
    options = ["task=likelihood", "num_images=3", "sampler.rtol=1e-2", "sampler.atol=1e-2",
               "task.terms=5", "trainer.accelerator=cpu"]  # fmt: skip
    for size in (1, 3):
        result = lab("eval", *options, f"batch_size={size}", f"hydra.run.dir=e{size}")
        assert result.code == 0, result.text
    for key in (("flow", "bits_per_dim"), ("bound", "bits_per_dim")):
        mean, error, count = table("e1")[key]
        assert count == 3 and error > 0 and 5 < mean < 40
        assert table("e3")[key][0] == pytest.approx(mean, rel=1e-4)
    assert "KL(q(x_1) ‖ prior)" in Path("e1/report.html").read_text()


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_slerp_rotates_by_a_fraction_of_the_angle(weight: float) -> None:
    """Two images of norm 2 at 60 degrees: the norm is kept, and the angle grows linearly."""
    a = torch.tensor([2.0, 0, 0, 0], dtype=torch.float64).reshape(1, 1, 2, 2)
    b = torch.tensor([1.0, 3**0.5, 0, 0], dtype=torch.float64).reshape(1, 1, 2, 2)
    angle = weight * math.pi / 3
    expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle), 0, 0]).double()
    torch.testing.assert_close(slerp(a, b, weight).flatten(), expected)


def test_interpolation_reconstructs_the_images_at_its_ends(lab: Command, run: Path) -> None:
    result = lab("eval", "task=interpolate", "num_images=2", "task.points=2", "hydra.run.dir=e",
                 "sampler.rtol=1e-4", "sampler.atol=1e-4", "trainer.accelerator=cpu")  # fmt: skip
    assert result.code == 0, result.text
    assert float(re.search(r"reconstruction of the ends: ([\d.]+) dB", result.text)[1]) > 45
    with Image.open("e/samples/grid.png") as picture:
        assert picture.width > picture.height > 128


def test_prior_can_be_used_with_another_schedule(lab: Command, run: Path) -> None:
    """E[x_0 | y] at a given σ_y does not depend on the schedule."""
    small = ["guidance=mmse", *SMALL, "sampler.steps=1"]
    lab("eval", "sigma_y=0.7", "hydra.run.dir=own", *small)
    result = lab("eval", "sigma_y=0.7", "hydra.run.dir=ve", "schedule=ve",
                 "schedule.sigma_max=150", *small)  # fmt: skip
    assert result.code == 0, result.text
    assert table("ve")["mmse", "psnr"][0] == pytest.approx(table("own")["mmse", "psnr"][0], 1e-4)


def test_diffusers_folder_is_a_prior_and_initializes_a_training(lab: Command, run: Path) -> None:
    """The same weights give the same table, and a training can start from them."""
    unet = load_run(run).network
    save_unet(unet, "folder")
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained("folder")
    config = yaml.safe_load((run / ".hydra/config.yaml").read_text())
    data = [f"model.data.{key}={config['data'][key]}" for key in ("size", "split_seed")]
    data += [f"model.data.splits.{key}={n}" for key, n in config["data"]["splits"].items()]
    lab("eval", "hydra.run.dir=run", *SMALL)
    result = lab("eval", "model=pretrained", "model.path=folder", "data@model.data=faces",
                 "hydra.run.dir=folder-eval", *data, *SMALL)  # fmt: skip
    assert result.code == 0, result.text
    assert "very likely trained on the test images" in result.text
    assert "very likely trained on the test images" in Path("folder-eval/report.html").read_text()
    assert Path("folder-eval/results.csv").read_text() == Path("run/results.csv").read_text()

    started = lab("train", *TINY, "pretrained=folder", "trainer.max_steps=1", "optimizer.lr=1e-12",
                  "hydra.run.dir=started")  # fmt: skip
    assert started.code == 0, started.text
    for name, tensor in load_run("started").network.state_dict().items():
        torch.testing.assert_close(tensor, unet.state_dict()[name], rtol=0, atol=1e-9)
    refused = lab(
        "train", *TINY, "pretrained=folder", "network.channels=16", "trainer.max_steps=1"
    )
    assert refused.code == 1 and "does not fit network: " in refused.text
    assert "there; choose the network= of the folder" in refused.text


def test_samples_outside_of_the_range_of_the_data_give_a_warning(lab: Command, run: Path) -> None:
    common = ["task=generate", "num_samples=3", "sampler.steps=2", "trainer.accelerator=cpu"]
    text = "% of the values of the samples are outside of [-1, 1] by more than 0.1: the sampler"
    clipped = lab("eval", *common, "hydra.run.dir=c")
    assert clipped.code == 0 and text not in clipped.text
    free = lab("eval", *common, "sampler=euler_maruyama", "sampler.clip=false", "hydra.run.dir=f")
    assert free.code == 0 and f"{text} EulerMaruyama has amplified errors" in free.text


def test_all_images_of_another_source_without_splits_are_test_images(
    lab: Command, tiny: Command
) -> None:
    """The data of the run itself, in another place, keep their splits."""
    fill(Path("photos"), [f"{k}.png" for k in range(40)], 16)
    fill(Path("others"), [f"other {k}.png" for k in range(20)], 16)
    shares = "data.splits={train: 0.6, val: 0.2, test: 0.2}"
    own = ["data.source=photos", shares, "trainer.max_steps=1", "hydra.run.dir=a"]
    assert tiny(*own).code == 0
    common = ["run=a", "task=denoise", "num_samples=1", "sampler.steps=2", "num_images=20",
              "trainer.accelerator=cpu"]  # fmt: skip
    result = lab("eval", *common, "data.source=others", "hydra.run.dir=e")
    assert result.code == 0, result.text
    assert "=others has no splits and is not the data of the training: all its 20 i" in result.text
    assert table("e")["noisy", "psnr"][2] == 20
    Path("photos").rename("moved")
    result = lab("eval", *common, "data.source=moved", "hydra.run.dir=f")
    assert result.code == 1 and "num_images=20 is more than the " in result.text


class Code:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("broken-in"),))


def test_invalid_checkpoint_is_refused(lab: Command, run: Path) -> None:
    whole = (run / "checkpoints/last.ckpt").read_bytes()
    Path("short.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("text.ckpt").write_text("<html>not found</html>")
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "evil": Code()}, "code.ckpt")
    Path("pickle.ckpt").write_bytes(pickle.dumps(Code()))
    torch.save({"state_dict": {}}, "foreign.ckpt")
    evil = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    evil["diffusion_lab"]["config"]["network"] = {"_target_": "pathlib.Path", "a": "b"}
    torch.save(evil, "target.ckpt")
    for name, reason in {
        "short": "truncated or damaged", "text": "damaged", "empty": "truncated or damaged",
        "code": "holds code", "pickle": "holds code", "foreign": "not one written by",
        "target": "_target_=pathlib.Path is refused",
    }.items():  # fmt: skip
        result = lab("eval", f"ckpt={name}.ckpt", *SMALL)
        assert result.code == 1, name
        assert f"{name}.ckpt" in result.text and reason in result.text, (name, result.text)
        assert "Traceback" not in result.text
    assert not Path("broken-in").exists()
