"""Restoration tasks of eval.py: user images, divergence, rejected input, prior pairs."""

import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, find_refusal
from PIL import Image
from test_cli_eval import SMALL, table

from diffusion_lab.analytic import Gaussian
from diffusion_lab.errors import ConfigError
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import Cosine, Linear
from diffusion_lab.task.observations import PriorPairs
from diffusion_lab.task.prior_pairs import sample_prior_pairs
from diffusion_lab.task.results import Row, average
from diffusion_lab.task.user_images import read_image


def picture(path: str, size: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


TASKS = ("inpaint_box super_resolution deblur colorize compressed_sensing hdr tomography").split()


@pytest.mark.parametrize("task", TASKS)
def test_task_runs_with_its_default_method(lab: Command, run: Path, task: str) -> None:
    result = lab("eval", f"task={task}", "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    found = table("e")
    assert found["sample", "nonfinite"] == (0, pytest.approx(float("nan"), nan_ok=True), 5)
    assert ("mmse", "psnr") not in found and found["mean", "psnr"][2] == 5
    assert "Rank histograms" in Path("e/report.html").read_text()
    with Image.open("e/samples/grid.png") as grid:
        assert min(grid.size) >= 128


def test_user_image_is_degraded_and_evaluated(lab: Command, run: Path) -> None:
    """The noise is that of image 0; the PSNR of y does not depend on the network."""
    pixels = picture("own.png", (16, 16))
    assert torch.equal(
        read_image("image", "own.png", (3, 16, 16), False)[0].permute(1, 2, 0),
        torch.from_numpy(pixels).float() / 127.5 - 1,
    )
    result = lab("eval", "image=own.png", "sigma_y=0.3", "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    noise = KeyedGenerator(make_key(0, "observation", torch.zeros(1).long())).normal(3, 16, 16)
    psnr = float(10 * torch.log10(4 / (0.3 * noise).square().mean()))
    mean, _, count = table("e")["noisy", "psnr"]
    assert mean == pytest.approx(psnr, abs=1e-3) and count == 1


def test_user_observation_is_restored_without_a_reference(lab: Command, run: Path) -> None:
    """The table contains only the number of non-finite samples, since x_0 is unknown."""
    picture("noisy.png", (16, 16))
    result = lab("eval", "observation=noisy.png", "sigma_y=0.3", "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    assert set(table("e")) == {("sample", "nonfinite")}
    assert Path("e/samples/grid.png").exists()
    picture("small.png", (4, 4))
    result = lab("eval", "task=super_resolution", "observation=small.png", *SMALL)
    assert result.code == 0, result.text


def test_poisson_noise_has_the_variance_of_its_rate(lab: Command, run: Path) -> None:
    """y = 2 K / rate - 1: E (y - x_0)² = 2 (x_0 + 1) / rate."""
    image = np.full((16, 16, 3), 191, dtype=np.uint8)
    Image.fromarray(image).save("flat.png")
    result = lab(
        "eval", "task=deblur", "image=flat.png", "poisson_rate=50", "hydra.run.dir=e", *SMALL
    )
    assert result.code == 0, result.text
    expected = 10 * np.log10(4 / (2 * (191 / 127.5) / 50))  # a blur does not change a flat image
    assert table("e")["noisy", "psnr"][0] == pytest.approx(expected, abs=0.8)
    refused = lab("eval", "task=denoise", "poisson_rate=50", *SMALL)
    assert refused.code == 1 and "noise of one standard deviation" in refused.text


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=denoise", "sigma_y=1"],
        ["task=denoise", "poisson_rate=100", "guidance=dps"],
        pytest.param(["task=denoise", "t=1"], marks=pytest.mark.slow),
        pytest.param(["task=denoise", "snr_db=3"], marks=pytest.mark.slow),
        pytest.param(["task=inpaint_box", "sigma_y=1"], marks=pytest.mark.slow),
        pytest.param(["task=inpaint_box", "sigma_y=0", "guidance=ddnm"], marks=pytest.mark.slow),
        pytest.param(
            ["task=restore", "operator=identity", "sigma_y=0", "guidance=ddnm"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["task=denoise", "poisson_rate=100", "guidance=mmps"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_integers_and_poisson_noise_are_evaluated(
    lab: Command, run: Path, overrides: list[str]
) -> None:
    """E[x_0 | y] by one call of the network needs one noise level of the schedule."""
    result = lab("eval", *overrides, "hydra.run.dir=e", *SMALL)
    assert result.code == 0, result.text
    gaussian = overrides[0] == "task=denoise" and "poisson" not in overrides[1]
    assert (("mmse", "psnr") in table("e")) == gaussian
    assert ("sigma_t =" in result.text) == gaussian


@pytest.mark.parametrize("other", ["sigma_t=0.5", "snr_db=3", "truth_source=model"])
def test_gaussian_and_poisson_noise_exclude_each_other(other: str) -> None:
    text = find_refusal("eval", "task=denoise", "poisson_rate=100", "guidance=dps", other)
    assert text == (
        f"poisson_rate=100 states the noise; remove {other}, which is for Gaussian noise"
    )


def test_divergence_is_counted_in_the_table(lab: Command, run: Path) -> None:
    options = ["guidance=residual", "guidance.gain=1e30", "sampler.clip=false"]
    result = lab("eval", "hydra.run.dir=e", *options, *SMALL)
    assert result.code == 0, result.text
    assert table("e") == {
        ("sample", "nonfinite"): (5.0, pytest.approx(float("nan"), nan_ok=True), 5)
    }
    assert "an image is skipped" in result.text


def test_shared_particles_do_not_depend_on_the_batch_size(
    lab: Command,
    run: Path,
) -> None:
    for size in (3, 64):
        result = lab("eval", "task=inpaint_box", "guidance=tds", "guidance.share_particles=true",
                     f"batch_size={size}", f"hydra.run.dir=e{size}", *SMALL)  # fmt: skip
        assert result.code == 0, result.text
    assert table("e3")["sample", "psnr"][0] == pytest.approx(
        table("e64")["sample", "psnr"][0], 1e-5
    )


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["image=nowhere.png"], "image=nowhere.png does not exist"),
        (["image=grey.png"], "an image of mode L; the prior is of RGB images"),
        (["image=big.png"], "20 x 24 pixels; the prior needs 16 x 16"),
        (["image=text.png"], "cannot be read as an image"),
        (
            ["task=colorize", "observation=big.png"],
            "of Grayscale are not RGB images",
        ),
        (["image=big.png", "observation=big.png"], "exclude each other"),
        (["task=inpaint_box", "sigma_y=0", "guidance=tds"], "sigma_y=0: TDS divides by it"),
        (["task=hdr", "guidance=ddrm"], "DDRM is for linear operators, and HDR is not linear"),
        (
            ["task=phase_retrieval", "guidance=truncated"],
            "ReverseSDE is for a noisy image",
        ),
        (["task=super_resolution", "operator.factor=5"], "factor=5 is not allowed"),
        (["task=inpaint_box", "sigma_t=0.5"], "sigma_t"),
        (["task=deblur", "poisson_rate=-1"], "poisson_rate=-1 is not allowed"),
        (["guidance=tds", "guidance.particles=0"], "particles=0"),
        (["resume=nowhere"], "is not the directory of an evaluation"),
    ],
)
def test_invalid_images_and_incompatible_settings_are_named(
    lab: Command,
    run: Path,
    overrides: list[str],
    named: str,
) -> None:
    picture("grey.png", (16, 16), "L")
    picture("big.png", (20, 24))
    Path("text.png").write_text("no image")
    result = lab("eval", *overrides)
    assert result.code == 1 and named in result.text and "Traceback" not in result.text


def test_large_image_is_center_cropped_and_scaled(lab: Command) -> None:
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 20:60] = (200, 100, 0)  # the middle square
    Image.fromarray(image).save("wide.png")
    x = read_image("image", "wide.png", (3, 16, 16), True)
    inner = x[0, :, :, 2:-2].permute(1, 2, 0)  # the filter also reads pixels outside of the crop
    expected = (torch.tensor([200, 100, 0]) / 127.5 - 1).expand_as(inner)
    torch.testing.assert_close(inner, expected, atol=0.02, rtol=0)


def test_photo_is_rotated_by_its_exif_orientation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    upright = picture("upright.png", (16, 16))
    lying = Image.fromarray(np.rot90(upright))  # counterclockwise; orientation 6 is the inverse
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save("photo.png", exif=exif)
    assert torch.equal(
        read_image("image", "photo.png", (3, 16, 16), False),
        read_image("image", "upright.png", (3, 16, 16), False),
    )


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize("t", [0.2, 0.6])
def test_prior_pairs_have_the_moments_of_the_forward_process(schedule, t: float) -> None:
    """x_t ~ N(0, α² C + σ² I) and Cov(x_0, x_t) = α C."""
    variances = torch.tensor([0.05, 0.4, 1.5], dtype=torch.float64)
    prior = Gaussian(torch.zeros(3), torch.diag(variances))
    x_t, x_0 = sample_prior_pairs(prior.denoiser(schedule), (3,), t, 0, torch.arange(4000))
    alpha_t, sigma_t = (float(c) for c in schedule(torch.tensor(t, dtype=torch.float64)))
    both = torch.cat([x_t, x_0], 1).double().T.cov()
    total = alpha_t**2 * variances + sigma_t**2
    for found, wanted in (
        (both[:3, :3].diagonal(), total), (both[3:, 3:].diagonal(), variances),
        (both[:3, 3:].diagonal(), alpha_t * variances),
    ):  # fmt: skip
        error = 5 * (total * variances / 4000).sqrt() + 0.03 * wanted  # 4000 draws; 200 steps
        assert bool(((found - wanted).abs() < error).all()), (found, wanted)


def test_mean_of_infinite_values_has_no_error() -> None:
    assert repr(average("noisy", "psnr", [math.inf, 2.0])) == repr(
        Row("noisy", "psnr", math.inf, math.nan, 2)
    )
    assert math.isnan(average("noisy", "psnr", [math.inf, -math.inf]).mean)
    assert average("noisy", "psnr", [1.0, 2.0, 3.0])[2:] == (2.0, pytest.approx(3**-0.5), 3)


def test_observations_of_prior_pairs_have_the_noise_of_their_level() -> None:
    """y = x_t / α_t = x_0 + r n: Cov(x_0, y) = C and Var(y) = C + r²."""
    variance = 0.04  # far inside of [-1, 1], the range of the clipped estimate
    prior = Gaussian(torch.zeros(3), variance * torch.eye(3))
    x_0, y = PriorPairs(prior.denoiser(Linear()), (3,), 0.4, 0)(torch.arange(4000))
    ratio = float(Linear().ratio(0.4))
    assert 0.5 < ratio < 3
    assert float((x_0 * y).mean()) == pytest.approx(variance, abs=0.015)
    assert float(y.var()) == pytest.approx(variance + ratio**2, rel=0.05)


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("I;16", "Scale its values to 0 ... 255"),
        ("F", "Scale its values to 0 ... 255"),
        ("RGBA", "Put it on a background"),
        ("L", "Convert it"),
        ("CMYK", "Convert it"),
    ],
)
def test_advice_for_images_of_other_modes_keeps_the_picture(
    mode: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "it's.tiff"
    Image.new(mode, (16, 16), 100).save(path)
    with pytest.raises(ConfigError, match=re.escape(advice)) as error:
        read_image("image", path, (3, 16, 16), False)
    if advice == "Convert it":
        _, option, program, name = shlex.split(str(error.value).split("with: ")[1])
        assert option == "-c" and name == path
        monkeypatch.setattr(sys, "argv", ["-c", name])
        exec(program)
        with Image.open("rgb.png") as converted, Image.open(path) as image:
            assert np.array_equal(converted, image.convert("RGB"))
