"""PSNR against its formula, SSIM against scikit-image."""

import math

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from diffusion_lab.metric import psnr, ssim


def uniform(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 1


def smooth(count: int, size: int = 32) -> Tensor:
    """Images with structure: waves with a different wavelength in each image."""
    grid = torch.linspace(0, 6, size)
    k = torch.arange(1.0, count + 1)[:, None, None, None]
    phase = torch.arange(3.0)[None, :, None, None]
    return 0.8 * torch.sin(k * grid[:, None] + phase) * torch.cos(grid * k / 2)


@pytest.mark.parametrize("offset", [0.02, -0.5, 2.0])
def test_psnr_of_a_constant_error(offset: float) -> None:
    x_0 = uniform(2, 3, 8, 8)
    expected = 10 * math.log10(4 / offset**2)
    torch.testing.assert_close(psnr(x_0 + offset, x_0), torch.full((2,), expected))


def test_psnr_is_per_image_and_without_clipping() -> None:
    x_0 = uniform(3, 3, 8, 8)
    estimate = x_0.clone()
    estimate[1, 2, 0, 0] += 5  # far outside [-1, 1]
    estimate[2] += 0.1
    values = psnr(estimate, x_0)
    assert values[0] == math.inf
    assert float(values[1]) == pytest.approx(10 * math.log10(4 / (25 / 192)), rel=1e-5)
    assert float(values[2]) == pytest.approx(20 * math.log10(20), rel=1e-5)


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0])
def test_ssim_matches_scikit_image(std: float) -> None:
    x_0 = smooth(3)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    estimate = x_0 + std * noise
    reference = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2,
        )
        for a, b in zip(estimate, x_0, strict=True)
    ]
    # The images differ, so that their order is tested.
    assert max(reference) - min(reference) > 0.001
    assert ssim(estimate, x_0).tolist() == pytest.approx(reference, abs=2e-5)


def test_ssim_of_a_single_image_matches_the_batch() -> None:
    x_0 = smooth(3)
    estimate = x_0 + 0.2 * uniform(3, 3, 32, 32)
    assert ssim(estimate[1:2], x_0[1:2]).tolist() == pytest.approx(
        [float(ssim(estimate, x_0)[1])], abs=1e-6
    )


def test_ssim_of_an_image_with_itself_is_one() -> None:
    x_0 = smooth(2)
    torch.testing.assert_close(ssim(x_0, x_0), torch.ones(2), rtol=0, atol=1e-6)
