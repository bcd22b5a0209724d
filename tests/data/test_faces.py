"""Procedural faces: pure functions of (seed, index) that show their factors."""

import pytest
import torch
from torch import Tensor

from diffusion_lab.data import faces
from diffusion_lab.data.face_canvas import Canvas
from diffusion_lab.data.faces import HAIR_STYLES, draw_faces, face_factors, render_faces

COUNT = 2000


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw_faces(torch.arange(COUNT))


@pytest.fixture(scope="module")
def factors() -> dict[str, Tensor]:
    return face_factors(torch.arange(COUNT))


def change(name: str, before: Tensor | float, after: Tensor | float, size: int = 32) -> Tensor:
    """Mean absolute change (H, W) of 200 faces, in grey levels, when one factor is edited."""
    f = face_factors(torch.arange(200))
    pair = []
    for value in (before, after):
        edited = torch.as_tensor(value, dtype=f[name].dtype).expand_as(f[name])
        pair.append(render_faces(f | {name: edited}, size=size).float())
    return (pair[1] - pair[0]).abs().mean(dim=(0, 3))


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_shape_and_range(images: Tensor) -> None:
    assert images.shape == (COUNT, 32, 32, 3) and images.dtype == torch.uint8
    values = images.float()
    assert images.min() < 10 and images.max() > 245
    assert 40 < values.std() < 80  # neither low contrast nor saturated
    assert 90 < values.mean() < 150
    assert draw_faces(torch.arange(0), size=8).shape == (0, 8, 8, 3)


def test_face_does_not_depend_on_the_batch_or_the_chunk_size(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = torch.cat([draw_faces(torch.tensor([i])) for i in range(40)])
    assert torch.equal(alone, images[:40])
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:300]
    assert torch.equal(draw_faces(order), images[order])
    monkeypatch.setattr(faces, "CHUNK", 7 * 32**2)
    assert torch.equal(draw_faces(torch.arange(100)), images[:100])


def test_faces_of_different_indices_and_seeds_differ(images: Tensor) -> None:
    assert len(images.flatten(1).unique(dim=0)) == COUNT
    other = draw_faces(torch.arange(100), seed=1)
    distance = (other.float() - images[:100].float()).abs().mean(dim=(1, 2, 3))
    assert distance.min() > 5
    assert (images[1:101].float() - images[:100].float()).abs().mean(dim=(1, 2, 3)).min() > 5


@pytest.mark.parametrize("size", [8, 16, 64, 128])
def test_all_sizes_show_the_same_face(size: int, images: Tensor) -> None:
    small = min(size, 32)
    a = draw_faces(torch.arange(32), size=size).permute(0, 3, 1, 2).float()
    b = images[:32].permute(0, 3, 1, 2).float()
    a, b = (torch.nn.functional.adaptive_avg_pool2d(x, small) for x in (a, b))
    difference = (a - b).abs().mean(dim=(1, 2, 3))
    assert difference.max() < 3
    assert (a - b.roll(1, 0)).abs().mean() > 20  # other faces differ much more


@pytest.mark.parametrize("size", [48, 4, 2048, 0])
def test_size_that_is_not_a_supported_power_of_two_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size={size} .*8, 16, 32.*1024"):
        draw_faces(torch.arange(1), size=size)


def test_factors_have_their_frequencies(factors: dict[str, Tensor]) -> None:
    def expect(name: str, value: Tensor, p: float) -> None:
        sigma = (p * (1 - p) / COUNT) ** 0.5
        assert abs(value.float().mean().item() - p) < 4 * sigma, name

    expect("glasses", factors["glasses"], 0.22)
    expect("feminine", factors["feminine"], 0.5)
    expect("beard or moustache", factors["beard"] | factors["moustache"], 0.2)
    assert not (factors["beard"] & factors["feminine"]).any()
    styles = torch.bincount(factors["hair_style"], minlength=len(HAIR_STYLES))
    assert styles.shape == (len(HAIR_STYLES),) and styles.min() > 0.02 * COUNT
    assert factors["tone"].min() < 0.01 and factors["tone"].max() > 0.99


def test_colours_match_the_factors(images: Tensor, factors: dict[str, Tensor]) -> None:
    pixels = images.float() / 255
    corners = pixels[:, :2, [0, 1, 30, 31]].mean(dim=(1, 2))
    assert correlation(corners, factors["background"]) > 0.85
    cheeks = pixels[:, 18:20, [12, 19]].mean(dim=(1, 2))
    assert correlation(cheeks, factors["skin"]) > 0.95
    chest = pixels[:, 31, 6:26].mean(dim=1)[factors["hair_style"] < 4]
    assert correlation(chest, factors["cloth"][factors["hair_style"] < 4]) > 0.85
    crown = pixels[:, 5, 14:18].mean(dim=1)[factors["hair_style"] == 6]
    assert correlation(crown, factors["hair"][factors["hair_style"] == 6]) > 0.85


def test_factors_change_only_their_part_of_the_face() -> None:
    glasses = change("glasses", False, True)
    assert glasses[10:19, 7:25].mean() > 5
    assert glasses[:8].max() == 0 and glasses[21:].max() == 0
    smile = change("smile", 0.0, 1.0)
    assert smile[19:25, 11:21].mean() > 3
    assert smile[:12].max() == 0 and smile[28:].max() == 0
    beard = change("beard", False, True)
    assert beard[22:27, 11:21].mean() > 10 and beard[:12].max() == 0
    gaze = change("gaze_x", -1.0, 1.0)
    assert gaze[13:17, 9:23].mean() > 2 and gaze[:10].max() == 0 and gaze[20:].max() == 0
    bald, long = float(HAIR_STYLES.index("bald")), float(HAIR_STYLES.index("long"))
    hair = change("hair_style", bald, long)
    assert hair[5:8, 12:20].mean() > 25 and hair[:2].max() == 0


def test_light_brightens_the_side_that_it_comes_from() -> None:
    f = face_factors(torch.arange(200))
    lit = [
        render_faces(f | {"light_x": torch.full((200,), x), "yaw": torch.zeros(200)}).float()
        for x in (-1.0, 1.0)
    ]
    gain = (lit[1] - lit[0]).mean(dim=(0, 3))[17:21]  # below the eyes, above the mouth
    assert gain[:, 9:13].mean() < -5 and gain[:, 19:23].mean() > 5


def test_windows_do_not_crop_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts drawn on a window of the frame equal parts drawn on the whole frame."""
    index = torch.arange(1000)
    expected = draw_faces(index)
    crop = Canvas.crop

    def whole(canvas: Canvas, top: float, bottom: float, side: float) -> Canvas:
        return crop(canvas, top, bottom, side) if bottom == 1 else crop(canvas, 0, 1, 0.5)

    monkeypatch.setattr(Canvas, "crop", whole)
    assert (draw_faces(index).int() - expected.int()).abs().max() <= 1
