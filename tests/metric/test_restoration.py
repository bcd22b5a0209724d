"""PSNR against its formula, SSIM against scikit-image."""

import math

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from diffusion_lab.metric import psnr, ssim
from diffusion_lab.pixels import to_uint8


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


def reference(estimate: Tensor, x_0: Tensor, data_range: float) -> list[float]:
    """SSIM of scikit-image, with the settings of Wang et al."""
    return [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=data_range,
        )
        for a, b in zip(estimate, x_0, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0])
def test_ssim_matches_scikit_image_on_8_bit_images(std: float) -> None:
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    clean = to_uint8(smooth(3))
    levels = to_uint8(smooth(3) + std * noise)
    x_0, estimate = (images.float() / 127.5 - 1 for images in (clean, levels))
    expected = reference(levels, clean, 255)
    # The images differ, so that their order is tested.
    assert max(expected) - min(expected) > 0.001
    assert ssim(estimate, x_0).tolist() == pytest.approx(expected, abs=2e-6)


def test_ssim_matches_scikit_image_outside_the_range_of_pixels() -> None:
    """Estimates are not clipped."""
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    estimate, x_0 = 2 * smooth(3) + noise, smooth(3)
    expected = reference((estimate.double() + 1) / 2, (x_0.double() + 1) / 2, 1)
    assert ssim(estimate, x_0).tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("a", "b"), [(122, 133), (0, 255), (10, 20), (250, 200)])
def test_ssim_of_uniform_images_compares_their_luminance(a: int, b: int) -> None:
    """(2 a b + C_1) / (a² + b² + C_1) with C_1 = (0.01 · 255)², between 0 and 1."""
    x, y = (torch.full((1, 3, 16, 16), level / 127.5 - 1) for level in (a, b))
    c_1 = 2.55**2
    expected = (2 * a * b + c_1) / (a**2 + b**2 + c_1)
    assert float(ssim(x, y)) == pytest.approx(expected, abs=2e-6)


def test_ssim_of_a_single_image_matches_the_batch() -> None:
    x_0 = smooth(3)
    estimate = x_0 + 0.2 * uniform(3, 3, 32, 32)
    assert ssim(estimate[1:2], x_0[1:2]).tolist() == pytest.approx(
        [float(ssim(estimate, x_0)[1])], abs=1e-6
    )


def test_ssim_of_an_image_with_itself_is_one() -> None:
    x_0 = smooth(2)
    torch.testing.assert_close(ssim(x_0, x_0), torch.ones(2), rtol=0, atol=1e-6)
