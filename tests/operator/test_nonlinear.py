"""Nonlinear operators: values against other programs, gradients against finite differences."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from diffusion_lab.operator import HDR, JPEG, Operator, PhaseRetrieval
from diffusion_lab.operator.jpeg import quantization


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def photo(height: int = 64, width: int = 64) -> Tensor:
    """A photo of a face, of shape (1, 3, height, width), in [-1, 1]."""
    pixels = data.astronaut()[60 : 60 + height, 180 : 180 + width]
    return torch.as_tensor(pixels.copy()).double().permute(2, 0, 1)[None] / 127.5 - 1


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


OPERATORS = {
    "phase_retrieval": PhaseRetrieval((3, 6, 5)),
    "phase_retrieval_tight": PhaseRetrieval((3, 6, 5), oversampling=1.5),
    "hdr": HDR((3, 6, 5)),
    "jpeg": JPEG((3, 6, 5)),
    "jpeg_fine": JPEG((3, 6, 5), quality=95),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


@every_operator
def test_images_of_a_batch_are_independent_and_float32_agrees(operator: Operator) -> None:
    x = draw(3, 3, 6, 5).clamp(-1, 1)
    y = operator(x)
    alone = torch.cat([operator(x[k : k + 1]) for k in range(3)])
    close(y, alone)
    close(operator.to_image(y), torch.cat([operator.to_image(z[None]) for z in y]))
    single = operator(x.float())
    assert single.dtype == torch.float32
    close(single.double(), y, 1e-5)
    assert operator.to_image(y).shape == x.shape
    assert operator.state_dict() == {}


# --- phase retrieval ----------------------------------------------------------------------------


def test_phase_retrieval_matches_numpy_fft_magnitudes() -> None:
    x = draw(2, 3, 6, 5).clamp(-1, 1)
    padded = np.zeros((2, 3, 12, 10))
    padded[:, :, 3:9, 2:7] = (x.numpy() + 1) / 2  # centered; the position does not matter
    expected = np.abs(np.fft.fft2(padded)) / np.sqrt(120)
    close(PhaseRetrieval((3, 6, 5))(x), torch.as_tensor(expected))
    assert PhaseRetrieval((3, 6, 5), 1.5)(x).shape == (2, 3, 9, 8)
    close(PhaseRetrieval((3, 6, 5), 3)(x).square().sum(), ((x + 1) / 2).square().sum(), 1e-10)


def test_phase_retrieval_is_invariant_to_rotation_but_not_to_sign() -> None:
    """The rotation is by 180 degrees."""
    operator = PhaseRetrieval((3, 6, 5))
    x = draw(1, 3, 6, 5).clamp(-1, 1)
    close(operator(x.flip((-2, -1))), operator(x))
    assert float((operator(-x) - operator(x)).abs().max()) > 0.1


def test_gradient_of_phase_retrieval() -> None:
    operator = PhaseRetrieval((1, 4, 3))
    assert torch.autograd.gradcheck(operator, draw(2, 1, 4, 3, seed=4).requires_grad_())
    black = torch.full((1, 1, 4, 3), -1.0, requires_grad=True)  # all magnitudes are zero
    assert torch.equal(
        torch.autograd.grad(operator(black).sum(), black)[0], torch.zeros_like(black)
    )


def test_image_of_magnitudes_has_frequency_zero_in_the_center() -> None:
    operator = PhaseRetrieval((3, 16, 16))
    shown = operator.to_image(operator(torch.ones(1, 3, 16, 16)))
    assert float(shown.max()) == pytest.approx(1) and float(shown.min()) >= -1
    assert torch.equal(shown[0, 0].argmax(), torch.tensor(8 * 16 + 8))
    dark = operator.to_image(torch.zeros(1, 3, 32, 32))
    assert torch.equal(dark, torch.full_like(dark, -1))


# --- high dynamic range -------------------------------------------------------------------------


def test_hdr_scales_and_clips() -> None:
    x = torch.tensor([[-1.0, -0.5, -0.25, 0.0, 0.3, 0.5, 0.9]])
    close(HDR()(x), torch.tensor([[-1.0, -1.0, -0.5, 0.0, 0.6, 1.0, 1.0]]), 1e-6)
    close(HDR(factor=1)(x), x)
    assert HDR().shape is None and HDR((3, 4, 4)).shape == (3, 4, 4)


def test_gradient_of_hdr_is_zero_for_clipped_pixels() -> None:
    x = torch.tensor([[-0.9, -0.4, 0.1, 0.45, 0.6]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(HDR(), x)
    (gradient,) = torch.autograd.grad(HDR()(x).sum(), x)
    assert gradient.tolist() == [[0, 2, 2, 2, 0]]


# --- JPEG ---------------------------------------------------------------------------------------


def pillow(x: Tensor, quality: int) -> tuple[Tensor, Image.Image]:
    """Pillow's JPEG of an image without subsampling, and the opened file."""
    pixels = ((x[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels.squeeze())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    opened = Image.open(buffer)
    decoded = torch.as_tensor(np.array(opened)).double().reshape(*pixels.shape)
    return decoded.permute(2, 0, 1)[None] / 127.5 - 1, opened


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 75, 95, 100])
def test_quantization_tables_match_pillow(quality: int) -> None:
    _, opened = pillow(photo(16, 16), quality)
    for ours, theirs in zip(quantization(quality), opened.quantization.values(), strict=True):
        assert ours.flatten().long().tolist() == list(theirs)


@pytest.mark.parametrize("quality", [5, 10, 50, 90])
@pytest.mark.parametrize("shape", [(64, 64), (45, 61)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_matches_pillow_up_to_rounding(
    quality: int, shape: tuple[int, int], channels: int
) -> None:
    """Pillow also rounds the decoded pixels to 8 bits."""
    x = photo(*shape)[:, :channels]
    y = JPEG(x.shape[1:], quality)(x)
    theirs, _ = pillow(x, quality)
    loss = rmse(theirs, x)  # the error of JPEG compression
    assert rmse(y, x) == pytest.approx(loss, rel=0.02)
    # Half of all values agree within a gray level; some coefficients round differently.
    assert float((y - theirs).abs().median()) < 2 / 255
    assert rmse(y, theirs) < 0.5 * loss
    assert float(y.abs().max()) <= 1


def test_jpeg_of_a_gray_image_and_of_its_own_output() -> None:
    grey = torch.full((1, 3, 16, 16), 0.25, dtype=torch.float64)
    step = float(quantization(10)[0, 0, 0])  # the quantization step of 8 times the mean of a block
    mean = round((0.25 * 127.5 - 0.5) * 8 / step) * step / 8 + 0.5
    close(JPEG((3, 16, 16), 10)(grey), torch.full_like(grey, mean / 127.5))
    # A second application has no effect (no pixel of this image is clipped).
    x = 0.5 * photo()
    y = JPEG((3, 64, 64), 30)(x)
    assert float(y.abs().max()) < 1
    close(JPEG((3, 64, 64), 30)(y), y, 1e-10)


def test_gradient_of_jpeg_ignores_rounding() -> None:
    x = photo(21, 30)
    operator = JPEG((3, 21, 30), quality=10)
    _, vjp = torch.func.vjp(operator, x)
    v = draw(*x.shape)
    close(vjp(v)[0], v)
    # For differences larger than the quantization steps, it is the slope of A itself.
    fine, direction = JPEG((3, 21, 30), quality=100), 0.15 * v.clamp(-3, 3)
    slope = (fine(0.3 * x + direction) - fine(0.3 * x - direction)) / 2
    assert rmse(slope, direction) < 0.02 * rmse(direction, torch.zeros_like(direction))


REFUSED = [
    (lambda: JPEG((2, 8, 8)), r"\(2, 8, 8\).*1 or 3 channels"),
    (lambda: JPEG((3, 8, 8), quality=0), r"quality=0.*in \[1, 100\]"),
    (lambda: JPEG((3, 8, 8), quality=7.5), r"quality=7\.5.*an integer"),
    (lambda: PhaseRetrieval((3, 8, 8), 0.5), r"oversampling=0\.5.*in \[1, 8\]"),
    (lambda: HDR(factor=float("inf")), "factor=inf.*a number >= 1"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_invalid_settings_are_an_error(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
