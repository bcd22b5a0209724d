"""Image grids: grey levels, positions, colours and files."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffusion_lab.pixels import to_uint8
from diffusion_lab.report.image_grid import COLOURS, image_grid, labelled_grid, save_png, std_map


def flat(*levels: int, size: int = 4) -> Tensor:
    """Uniform grey images (N, 3, size, size) in [-1, 1], one for each level."""
    return (torch.tensor(levels) / 127.5 - 1)[:, None, None, None].expand(-1, 3, size, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_restores_all_levels(dtype: torch.dtype) -> None:
    levels = torch.arange(256)
    x = levels.to(dtype) / 127.5 - 1
    assert torch.equal(to_uint8(x.reshape(16, 16)), levels.to(torch.uint8).reshape(16, 16))


def test_levels_are_rounded_not_truncated() -> None:
    x = torch.tensor([99.4, 99.6, 0.6, 254.6]) / 127.5 - 1
    assert to_uint8(x).tolist() == [99, 100, 1, 255]


def test_half_precision_is_scaled_in_single_precision() -> None:
    x = torch.linspace(-1, 1, 1001).to(torch.bfloat16)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))
    assert to_uint8(x).unique().numel() > 128


def test_values_outside_the_range_are_clamped() -> None:
    assert to_uint8(torch.tensor([1.5, -3.0, 1.0001, 1e30])).tolist() == [255, 0, 255, 255]


def test_non_finite_values_are_counted_in_the_error() -> None:
    x = torch.zeros(3, 4, 4)
    x[0, 0, 0], x[1, 2, 3] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 48 values"):
        to_uint8(x)


def test_integer_input_is_an_error() -> None:
    with pytest.raises(TypeError, match="uint8"):
        to_uint8(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_images_are_at_their_positions_on_white() -> None:
    levels = [10, 20, 30, 40, 50]
    grid = image_grid(flat(*levels), columns=3, pad=2)
    assert grid.shape == (3, 2 * 6 + 2, 3 * 6 + 2)
    expected = torch.full((3, 14, 20), 255, dtype=torch.uint8)
    for top, left, level in [(2, 2, 10), (2, 8, 20), (2, 14, 30), (8, 2, 40), (8, 8, 50)]:
        expected[:, top : top + 4, left : left + 4] = level
    assert torch.equal(grid, expected)


def test_grid_keeps_the_orientation_and_the_channels() -> None:
    levels = torch.arange(3 * 2 * 5, dtype=torch.uint8).reshape(1, 3, 2, 5)
    grid = image_grid(levels / 127.5 - 1, columns=4, pad=1)
    assert torch.equal(grid[:, 1:-1, 1:-1], levels[0])


@pytest.mark.parametrize(
    ("shape", "columns", "pad"), [((2, 1, 4, 4), 2, 2), ((3, 4, 4), 2, 2), ((0, 3, 4, 4), 2, 2)]
)
def test_grid_of_an_invalid_shape_is_an_error(
    shape: tuple[int, ...], columns: int, pad: int
) -> None:
    with pytest.raises(ValueError, match="shape"):
        image_grid(torch.zeros(shape), columns, pad)


def test_grid_without_columns_is_an_error() -> None:
    with pytest.raises(ValueError, match="columns"):
        image_grid(flat(1, 2), columns=0)


def boxes(picture: Image.Image, level: int) -> tuple[int, int, int, int] | None:
    """The bounding box (left, top, right, bottom) of all pixels of one grey level."""
    same = ImageChops.difference(picture, Image.new("RGB", picture.size, (level,) * 3))
    return same.convert("L").point(lambda v: 255 if v == 0 else 0).getbbox()


def test_labelled_grid_enlarges_small_images_by_an_integer_factor() -> None:
    rows = [flat(90, 140, size=32), flat(200, size=32)]
    picture = labelled_grid(rows, ["clean", "noisy"], ["first", "second"])
    first, right, below = (boxes(picture, level) for level in (90, 140, 200))
    for box in (first, right, below):
        assert (box[2] - box[0], box[3] - box[1]) == (128, 128)
        assert len(picture.crop(box).getcolors()) == 1
    assert right[1] == first[1] and right[0] > first[2]
    assert below[0] == first[0] and below[1] > first[3]
    # The second row is shorter, so its last position is white.
    place = (right[0], below[1], right[2], below[3])
    assert picture.crop(place).getcolors() == [(128 * 128, (255, 255, 255))]


def test_labelled_grid_repeats_pixels_without_smoothing() -> None:
    image = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand(1, 3, 2, 2)
    picture = labelled_grid([image], [""], scale=5)
    box = boxes(picture, 0)
    assert (box[2] - box[0], box[3] - box[1]) == (10, 10)
    tile = pil_to_tensor(picture.crop(box))
    expected = to_uint8(image[0]).repeat_interleave(5, 1).repeat_interleave(5, 2)
    assert torch.equal(tile, expected)


def test_labelled_grid_does_not_enlarge_large_images() -> None:
    box = boxes(labelled_grid([flat(77, size=256)], ["clean"]), 77)
    assert (box[2] - box[0], box[3] - box[1]) == (256, 256)


def ink(picture: Image.Image, box: tuple[int, int, int, int]) -> int:
    """The number of dark pixels in a region."""
    return sum(picture.crop(box).convert("L").histogram()[:128])


def test_captions_and_labels_are_at_their_positions() -> None:
    row = flat(200, 210, size=128)
    picture = labelled_grid([row], ["clean", ""], ["image 7"])
    first, second = boxes(picture, 200), boxes(picture, 210)
    assert ink(picture, (first[0], 0, first[2], first[1])) > 30
    assert ink(picture, (second[0], 0, second[2], second[1])) == 0
    assert ink(picture, (0, first[1], first[0], first[3])) > 30
    bare = labelled_grid([row], ["", ""])
    assert ink(bare, (0, 0, *bare.size)) == 0


def test_long_caption_is_wrapped() -> None:
    row = flat(200, 210, size=128)
    short = labelled_grid([row], ["noisy", "noisy"])
    long = labelled_grid([row], ["a caption far too long for one image of this size", "noisy"])
    assert long.width == short.width
    assert boxes(long, 200)[1] >= boxes(short, 200)[1] + 26  # at least two more lines
    word = labelled_grid([row], ["incomprehensibilities" * 2, "noisy"])
    assert word.width > short.width  # a single word is not wrapped, so the column is wider


def test_greek_letters_are_spelled_out() -> None:
    row = flat(200, size=128)
    spelled = labelled_grid([row], ["σ = 0.4"])
    assert spelled.tobytes() == labelled_grid([row], ["sigma = 0.4"]).tobytes()


@pytest.mark.parametrize(
    ("rows", "columns", "labels", "message"),
    [
        ([], ["a"], None, "at least one row"),
        ([flat(1, 2)], ["a"], None, "2 images, but there are 1 captions"),
        ([flat(1), flat(1, size=5)], ["a"], None, "different sizes"),
        ([flat(1)], ["a"], ["b", "c"], "2 labels for 1 rows"),
    ],
)
def test_labelled_grid_with_mismatched_arguments_is_an_error(
    rows: list[Tensor], columns: list[str], labels: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, columns, labels)


def luminance(picture: Tensor) -> Tensor:
    """Relative luminance (sRGB, linear light) of an image (3, H, W) in [-1, 1]."""
    value = (picture.double() + 1) / 2
    linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return torch.einsum("c,chw->hw", linear.new_tensor([0.2126, 0.7152, 0.0722]), linear)


def test_std_map_brightness_increases_monotonically() -> None:
    std = torch.linspace(0, 0.5, 1001).expand(1, 3, 1, 1001)
    picture, maximum = std_map(std)
    assert maximum == 0.5
    light = luminance(picture[0])[0]
    assert (light.diff() > 0).all()
    ends = to_uint8(picture[0, :, 0])[:, [0, -1]].T.tolist()
    assert ends == [list(bytes.fromhex(COLOURS[0])), list(bytes.fromhex(COLOURS[-1]))]


def test_std_map_shows_the_mean_of_the_channels() -> None:
    std = torch.tensor([0.1, 0.2, 0.6])[None, :, None, None].expand(1, 3, 2, 2)
    picture, maximum = std_map(std, maximum=0.4)
    same, _ = std_map(torch.full((1, 3, 2, 2), 0.3), maximum=0.4)
    assert maximum == 0.4
    torch.testing.assert_close(picture, same)
    assert std_map(std)[1] == pytest.approx(0.3)


def test_std_map_has_one_scale_for_the_batch_and_clamps_at_the_maximum() -> None:
    std = torch.stack([torch.full((3, 2, 2), 0.1), torch.full((3, 2, 2), 0.2)])
    picture, maximum = std_map(std)
    assert maximum == pytest.approx(0.2)
    assert luminance(picture[0]).max() < luminance(picture[1]).min()
    clamped, maximum = std_map(std, maximum=0.05)
    assert maximum == 0.05
    assert torch.equal(clamped[0], clamped[1])


def test_std_map_of_zeros_is_dark_with_maximum_zero() -> None:
    picture, maximum = std_map(torch.zeros(1, 3, 2, 2))
    assert maximum == 0
    assert to_uint8(picture[0, :, 1, 1]).tolist() == list(bytes.fromhex(COLOURS[0]))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_std_map_with_invalid_values_is_an_error(bad: float) -> None:
    std = torch.ones(1, 3, 2, 2)
    std[0, 1, 0, 0] = bad
    with pytest.raises(ValueError, match="1 of 12 standard"):
        std_map(std)


@pytest.mark.parametrize("maximum", [0.0, -1.0, float("nan")])
def test_std_map_with_an_invalid_maximum_is_an_error(maximum: float) -> None:
    with pytest.raises(ValueError, match="maximum"):
        std_map(torch.ones(1, 3, 2, 2), maximum)


def test_save_png_keeps_every_pixel_of_each_input_type(tmp_path: Path) -> None:
    levels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    image = Image.open(save_png(levels, tmp_path / "new" / "levels.png"))
    assert image.format == "PNG" and torch.equal(pil_to_tensor(image), levels)
    for name, picture in [("float.png", levels / 127.5 - 1), ("image.png", image)]:
        path = save_png(picture, tmp_path / name)
        assert path == tmp_path / name
        assert torch.equal(pil_to_tensor(Image.open(path)), levels)


def test_failed_save_png_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_png(torch.zeros(3, 2, 2), tmp_path / "a.png")
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            save_png(torch.ones(3, 2, 2), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert save_png(torch.ones(3, 2, 2), path).read_bytes() != old


def test_save_png_uses_the_default_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = save_png(torch.zeros(3, 2, 2), tmp_path / "a.png")
    assert path.stat().st_mode == plain.stat().st_mode


def test_save_png_of_an_invalid_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        save_png(torch.zeros(1, 2, 2), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
