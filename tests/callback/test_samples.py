"""Images of the training callbacks: samples, noise levels and nearest training images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image
from test_module import Affine, make_module

from diffusion_lab.analytic import GaussianMixture
from diffusion_lab.callback import sample_animation as pictures
from diffusion_lab.callback.sample_animation import levels, nearest, progressive
from diffusion_lab.callback.schedule_plot import schedule_charts
from diffusion_lab.data.images import Images, Split
from diffusion_lab.errors import SamplingError
from diffusion_lab.loss import EDM, Likelihood
from diffusion_lab.parameterization import EDM as EDMOutput
from diffusion_lab.pixels import to_model, to_uint8
from diffusion_lab.report.trajectory import TrajectoryRecorder
from diffusion_lab.sampler import DDIM, Heun, Sampler
from diffusion_lab.schedule import EDM as EDMSchedule
from diffusion_lab.schedule import VE, VP, Linear
from diffusion_lab.timesteps import Importance, LogNormal


class Noise(Images):
    """Images of random pixels, all of them different."""

    def __init__(self, count: int, size: int = 8) -> None:
        generator = np.random.default_rng(0)
        self.array = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        self.size, self.names, self.groups = size, [str(k) for k in range(count)], [range(count)]

    def gather(self, positions: np.ndarray) -> np.ndarray:
        return self.array[positions]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Records the arguments of `labelled_grid`."""
    made: list[tuple] = []

    def labelled_grid(*parts) -> Image.Image:
        made.append(parts)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(pictures, "labelled_grid", labelled_grid)
    return made


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize("mirrored", [False, True])
def test_nearest_images_are_searched_among_the_first_images(
    grids: list, monkeypatch: pytest.MonkeyPatch, mirrored: bool, chunk: int
) -> None:
    """The samples are image 11, image 3 mirrored, and image 19, which is not searched."""
    monkeypatch.setattr(pictures, "CHUNK", chunk)
    split = Split(Noise(24), np.arange(1, 24))  # position k in the split is image k + 1
    x = to_model(torch.from_numpy(split.images.array))
    samples = torch.stack([x[11], x[3].flip(-1), x[19]]) * 0.98
    nearest(samples, split, 16, mirrored)
    rows, columns, labels = grids[0]
    assert columns[1].startswith("nearest of 16 training images")
    assert ("mirror" in columns[1]) == mirrored
    candidates = torch.cat([x[1:17], x[1:17].flip(-1)]) if mirrored else x[1:17]
    for sample, row, label in zip(samples, rows, labels, strict=True):
        rms = (candidates - sample).double().square().flatten(1).mean(1).sqrt()
        order = rms.argsort()[:3]
        assert torch.equal(row[0], sample) and torch.equal(row[1:], candidates[order])
        assert label == f"nearest: RMS {rms[order[0]]:.2f}"
    assert torch.equal(rows[0][1], x[11])
    assert torch.equal(rows[1][1], x[3].flip(-1)) == mirrored
    assert not any(torch.equal(image, x[19]) for image in rows[2][1:])


def test_fewer_training_images_give_fewer_neighbors(grids: list) -> None:
    split = Split(Noise(2), np.arange(2))
    nearest(to_model(torch.from_numpy(split.images.array)), split, 2048, mirrored=False)
    rows, columns, _ = grids[0]
    assert [len(row) for row in rows] == [3, 3] and len(columns) == 3
    assert "nearest of 2 training images" in columns[1]


@pytest.mark.parametrize("schedule", [Linear(), VE()], ids=["linear", "ve"])
def test_progressive_grid_shows_the_reverse_process(grids: list, schedule) -> None:
    """The grid has every second of 16 steps and the end; x_t is scaled to unit variance."""
    shape = (4, 3, 4, 4)
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 48), 0.1 * torch.eye(48)[None])
    flat, seen = prior.denoiser(schedule), []

    class Reshaped(type(flat)):
        def forward(self, x_t, t):
            return super().forward(x_t.flatten(1), t).reshape(x_t.shape)

    flat.__class__ = Reshaped
    sampler, recorder = DDIM(16), TrajectoryRecorder(schedule, rows=2, stride=2)

    def both(state) -> None:
        seen.append(state)
        recorder(state)

    start = schedule.prior(shape, torch.Generator().manual_seed(0))
    images = sampler(flat, start, callback=both)
    progressive(recorder.result(), schedule)
    rows, columns, labels = grids[0]
    kept = [*seen[:16:2], seen[-1]]
    assert len(columns) == 9 and columns[-1] == "sample" and columns[0].startswith("t = 1\n")
    assert labels == ["x_t", "E[x_0 | x_t]"] * 2
    for k in range(2):
        for j, state in enumerate(kept):
            alpha, sigma = schedule(torch.tensor(state.t, dtype=torch.float64))
            scaled = state.x_t[k] / (alpha**2 + sigma**2).sqrt()
            difference = rows[2 * k][j].int() - to_uint8(scaled).int()
            assert int(difference.abs().max()) <= 1
            assert torch.equal(rows[2 * k + 1][j], to_uint8(state.denoised[k]))
        assert torch.equal(rows[2 * k][-1], to_uint8(images[k]))
        # |x| > 1 for a standard normal x.
        saturated = (rows[2 * k][0] == 0) | (rows[2 * k][0] == 255)
        assert 0.1 < float(saturated.float().mean()) < 0.6


def test_levels_grid_denoises_an_image_in_the_middle_of_each_bin(grids: list) -> None:
    """Under Linear with uniform times, the indices are 50, 150, ..., 950.

    The EMA weights are used.
    """
    module = make_module(Affine())
    with torch.no_grad():
        module.network_ema.w.fill_(0.3)
    x_0 = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    epsilon = torch.linspace(2, -2, 48).reshape(1, 3, 4, 4)
    levels(module, x_0, epsilon)
    rows, columns, labels = grids[0]
    alpha_bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    for row in rows:
        assert torch.equal(row[:1], x_0)
    for k in range(10):
        index = (
            100 * k + 50
        )  # u = k / 10 + 0.05; the time is floor(1000 u) + 1, and the index is one less
        alpha, sigma = alpha_bar[index].sqrt(), (1 - alpha_bar[index]).sqrt()
        x_t = alpha * x_0[0] + sigma * epsilon[0]
        output = 0.3 * x_t - 0.4 * index / 1000
        torch.testing.assert_close(rows[0][k + 1], x_t.float(), rtol=1e-4, atol=1e-5)
        estimate = (x_t - sigma * output) / alpha
        torch.testing.assert_close(rows[1][k + 1], estimate.float(), rtol=1e-3, atol=1e-4)
        assert columns[k + 1] == f"bin {(k + 1) / 10:.1f}\nσ/α = {sigma / alpha:.3g}"
    assert labels == ["x_t", "E[x_0 | x_t]"]


def test_schedule_charts_show_the_schedule_and_the_loss_bins() -> None:
    charts = schedule_charts(make_module(schedule=VP()))
    t, alpha = map(torch.tensor, charts[0].series["α_t"])
    exponent = 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(alpha, torch.exp(-exponent / 2), rtol=1e-5, atol=1e-7)
    t, log_snr = map(torch.tensor, charts[1].series["ends of the loss bins"])
    expected = torch.tensor([1e-3 + k / 10 * 0.999 for k in range(11)])
    torch.testing.assert_close(t, expected, rtol=1e-5, atol=0)
    exponent = (0.1 * t + 19.9 * t**2 / 2).double()
    torch.testing.assert_close(
        log_snr.double(), -torch.log(torch.expm1(exponent)), rtol=1e-4, atol=1e-4
    )
    for density in charts[2].series.values():  # the density is uniform and the weight is constant
        assert density[1] == pytest.approx([density[1][5]] * 50, rel=0.06)
        assert sum(density[1]) / 50 == pytest.approx(1)


def test_schedule_chart_shows_the_weight_of_the_loss() -> None:
    """Likelihood with importance times has the weight g² / σ² for any density."""
    module = make_module(schedule=VP(), loss=Likelihood(), time=Importance())
    series = schedule_charts(module)[2].series
    # The density is steep before that.
    t = torch.tensor(series["density of t"][0][5:], dtype=torch.float64)
    exponent = 0.1 * t + 19.9 * t**2 / 2
    rate = (0.1 + 19.9 * t) / -torch.expm1(-exponent)
    weight = torch.tensor(series["weight of the output's error"][1][5:])
    torch.testing.assert_close(weight.double() * 0.999, rate, rtol=0.02, atol=0)
    density = torch.tensor(series["density of t"][1][5:])
    ratio = density.double() / rate
    torch.testing.assert_close(ratio, ratio[0].expand(45), rtol=0.02, atol=0)


def test_schedule_charts_of_edm_match_its_log_normal_density() -> None:
    """Half of the times are below r = e^-1.2; the weight of the output's error is one."""
    module = make_module(
        schedule=EDMSchedule(), parameterization=EDMOutput(), loss=EDM(), time=LogNormal()
    )
    charts = schedule_charts(module)
    _, ends = charts[1].series["ends of the loss bins"]
    assert ends[5] == pytest.approx(2.4, abs=1e-3)
    density, weight = (values for _, values in charts[2].series.values())
    assert weight == pytest.approx(density, rel=1e-6)


def test_run_writes_all_images_and_its_nearest_training_images(tiny: Command) -> None:
    result = tiny("logger=wandb", "trainer.max_steps=2", "hydra.run.dir=a", "sampler=heun")
    assert result.code == 0, result.text
    names = {"denoise", "grid", "levels", "nearest", "progressive"}
    files = Path("a/samples").glob("*.png")
    assert {p.stem for p in files} == {f"{n}-0000002" for n in names} | {"schedule-0000000"}
    media = Path("a/wandb").glob("offline-run-*/files/media/images/*/*.png")
    shown = {f"{p.parent.name}/{p.name.split('_')[0]}" for p in media}
    assert shown == {f"samples/{name}" for name in names} | {"schedule/plot"}
    assert "train/loss_bin/0.1 to 1.0 end at log SNR" in result.text
    grid = np.asarray(Image.open("a/samples/grid-0000002.png"))
    # The first sample of the grid, which is enlarged by 8 beside its neighbors.
    first = grid[2:18, 2:18]
    beside = np.asarray(Image.open("a/samples/nearest-0000002.png"))
    large = np.kron(first, np.ones((8, 8, 1), dtype=np.uint8))
    assert any(
        np.array_equal(beside[y : y + 128, x : x + 128], large)
        for y in range(20, 80) for x in range(60, 160)
    )  # fmt: skip


def test_diverging_sample_grid_does_not_stop_the_training(
    tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object, **__: object) -> None:
        raise SamplingError("x_t is not finite after step 1 of 2")

    monkeypatch.setattr(Sampler, "__call__", diverged)
    result = tiny("trainer.max_steps=3", "hydra.run.dir=a")
    assert result.code == 0, result.text
    assert "no sample grid at step 3: x_t is not finite after step 1 of 2" in result.text
    assert [p.name for p in Path("a/samples").iterdir()] == ["schedule-0000000.png"]
    assert Path("a/finished.json").exists()


def test_heun_trajectory_is_recorded_once_per_step() -> None:
    schedule = Linear()
    recorder = TrajectoryRecorder(schedule)
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    Heun(8)(prior.denoiser(schedule), torch.randn(3, 2), callback=recorder)
    times = recorder.result()["t"]
    assert len(times) == 9 and times[0] == 1 and times[-1] == 0
    assert times == sorted(times, reverse=True)
