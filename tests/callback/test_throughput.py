"""Throughput: FLOP counts, and a timer that excludes validation."""

import math

import pytest
import torch
from test_module import Rows, fit, make_module
from torch import nn

from diffusion_lab.callback import Throughput, throughput
from diffusion_lab.nn import UNet

pytestmark = pytest.mark.filterwarnings("ignore")


class Convolution(nn.Module):
    """One 3 x 3 convolution from 3 to 3 channels."""

    image_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.conv(x_t)


FLOPS = 2 * 9 * 3 * 3 * 16  # of an image of 4 x 4 pixels: 2 per multiply-add


def test_flops_of_a_convolution_are_counted() -> None:
    assert throughput.count_flops(Convolution(), (1, 3, 4, 4)) == FLOPS
    assert throughput.count_flops(Convolution(), (5, 3, 4, 4)) == 5 * FLOPS


def test_flops_of_the_ddpm_unet_match_the_expected_count() -> None:
    """The U-Net has 113.7 M parameters and is counted at 256 x 256 on the meta device.

    Without the optimized upsampling it takes 497 GFLOP. Optimized upsampling takes 4 multiply-adds
    per pixel and pair of channels instead of 9.
    """
    with torch.device("meta"):
        network = UNet(128, (1, 1, 2, 2, 4, 4), 2, (4,))
    assert sum(p.numel() for p in network.parameters()) == 113_673_219
    results = [(512, 16), (512, 32), (256, 64), (256, 128), (128, 256)]  # channels and size
    saved = sum(2 * (9 - 4) * channels**2 * size**2 for channels, size in results)
    kernels = sum(2 * channels**2 * 9 * 16 for channels, _ in results)  # computed from the weights
    counted = throughput.count_flops(network, (1, 3, 256, 256)) - kernels
    assert counted + saved == pytest.approx(497.0e9, rel=1e-4)


def test_counting_does_not_change_the_weights_of_a_compiled_network() -> None:
    network = Convolution()
    before = network.conv.weight.clone()
    compiled = torch.compile(network, backend="eager")
    assert throughput.count_flops(compiled, (1, 3, 4, 4)) == FLOPS
    assert torch.equal(network.conv.weight, before) and network.conv.weight.device.type == "cpu"


def test_peak_is_the_fastest_matrix_product_after_a_warmup(monkeypatch) -> None:
    """The clock is read twice per product. The products take 9, 0.5, 0.25, 1, 1 and 1 s."""
    spans, times = [9, 0.5, 0.25, 1, 1, 1], [0.0]
    for span in spans:
        times += [times[-1] + span, times[-1] + span]
    clock = iter(times)
    monkeypatch.setattr(throughput, "_now", lambda device: next(clock))
    peak = throughput.measure_peak(torch.device("cpu"), torch.float32)
    assert peak == 2 * 512**3 / 0.25
    assert torch.get_float32_matmul_precision() == "highest"


class Clock:
    """A fake clock: a batch takes 0.5 s and a validation batch 100 s."""

    def __init__(self) -> None:
        self.time = 7.0

    def now(self, device: torch.device) -> float:
        return self.time


def test_throughput_excludes_the_time_of_validation(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(throughput, "_now", clock.now)
    module, rows, callback = make_module(Convolution()), Rows(), Throughput(peak_tflops=2e-9)
    step, validate = module.training_step, module.validation_step

    def training_step(batch: dict, batch_idx: int) -> torch.Tensor:
        clock.time += 0.5
        return step(batch, batch_idx)

    def validation_step(batch: dict, batch_idx: int) -> None:
        clock.time += 100
        validate(batch, batch_idx)

    module.training_step, module.validation_step = training_step, validation_step
    fit(module, rows, callback, max_steps=8, max_epochs=1, val_check_interval=3,
        log_every_n_steps=4)  # fmt: skip
    assert sorted(rows.rows) == [4, 8]
    for number, row in enumerate(rows.rows.values(), start=1):
        assert row["train/images"] == 16 * number
        assert row["perf/images_per_second"] == pytest.approx(8)  # 4 images in 0.5 s
        assert row["perf/tflops"] == pytest.approx(3 * FLOPS * 8 / 1e12)
        assert row["perf/mfu"] == pytest.approx(3 * FLOPS * 8 / 2e3)
        assert 0.01 < row["perf/memory_gb"] < 1000


def test_image_count_continues_after_a_resume_and_includes_micro_batches() -> None:
    callback, rows = Throughput(1.0), Rows()
    callback.load_state_dict({"images": 100})
    fit(make_module(), rows, callback, max_steps=3, accumulate_grad_batches=2,
        log_every_n_steps=1)  # fmt: skip
    assert [row["train/images"] for row in rows.rows.values()] == [108, 116, 124]
    assert callback.state_dict() == {"images": 124}


def test_network_whose_flops_cannot_be_counted_is_still_trained(caplog) -> None:
    class Branching(Convolution):
        def forward(self, x_t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return self.conv(x_t) if float(index[0]) >= 0 else x_t

    rows = Rows()
    fit(make_module(Branching()), rows, Throughput(1.0), max_steps=1, log_every_n_steps=1)
    assert "cannot be counted" in caplog.text
    assert rows.rows[1]["perf/mfu"] == 0 and math.isfinite(rows.rows[1]["train/loss"])
