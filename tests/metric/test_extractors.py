"""Feature extractors: input, missing and custom weights, agreement with torch-fidelity."""

import hashlib
import pickle
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_fidelity
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion_lab.data.faces import draw_faces
from diffusion_lab.errors import ConfigError
from diffusion_lab.metric import (
    DINOv2,
    EfficientNetLite0,
    Inception,
    Moments,
    extract,
    features,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffusion_lab.metric.dinov2 import _positions
from diffusion_lab.metric.feature_statistics import PooledPixels
from diffusion_lab.metric.features import metric_name
from diffusion_lab.pixels import to_model, to_uint8
from diffusion_lab.runs import compose
from diffusion_lab.runs.instantiate import instantiate

FACES = 32


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    return draw_faces(torch.arange(2 * FACES), seed=0, size=32)


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def halves(faces: torch.Tensor, efficientnet: EfficientNetLite0) -> tuple[torch.Tensor, ...]:
    """The features of both halves of the faces."""
    return extract(efficientnet, faces).split(FACES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Inception network with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("reference", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


# --- torch-fidelity and torchmetrics ------------------------------------------------------------


class Ours(torch_fidelity.FeatureExtractorBase):
    """A wrapper of EfficientNet for torch-fidelity, whose images have the shape (B, 3, H, W)."""

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)
        self.network = EfficientNetLite0()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("320",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "320"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network(images.permute(0, 2, 3, 1)),)


class Listed(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.images[k]


@pytest.mark.slow
def test_all_metrics_match_torch_fidelity_and_torchmetrics(
    faces: torch.Tensor, halves: tuple[torch.Tensor, ...], efficientnet: EfficientNetLite0
) -> None:
    """Slightly blurred faces are compared with other faces.

    There are more feature dimensions than images.
    """
    drawn, real = faces.split(FACES)
    blurred = F.avg_pool2d(drawn.permute(0, 3, 1, 2).float(), 3, 1, 1).permute(0, 2, 3, 1)
    drawn = torch.lerp(drawn.float(), blurred, 0.3).round().byte()
    torch_fidelity.register_feature_extractor("efficientnet-test", Ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_fidelity.calculate_metrics(
            input1=Listed(drawn), input2=Listed(real), feature_extractor="efficientnet-test",
            fid=True, kid=True, prc=True, kid_subsets=1, kid_subset_size=FACES, cuda=False,
            cache=False, save_cpu_ram=True, verbose=False,
        )  # fmt: skip
    a, b = extract(efficientnet, drawn), halves[1]
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    kernel, _ = kernel_distance(a, b)
    assert kernel == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    precision, recall = precision_recall(a, b)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)
    assert 0 < precision < 1 and 0 < recall < 1

    class Given(torch.nn.Module):
        """An extractor that returns given features."""

        num_features = 320

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    metric = FrechetInceptionDistance(feature=Given(), normalize=True).set_dtype(torch.float64)
    metric.update(a.double(), real=False)
    metric.update(b.double(), real=True)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-3)


def test_metrics_are_small_between_halves_and_large_for_noisy_images(
    faces: torch.Tensor, halves: tuple[torch.Tensor, ...], efficientnet: EfficientNetLite0
) -> None:
    """Both halves have the same distribution, so KID is 0 within its error."""
    a, b = halves
    kernel, error = kernel_distance(a, b)
    assert abs(kernel) < 3 * error
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-30, 31, faces[:FACES].shape, generator=generator)
    noisy = (faces[:FACES].int() + noise).clamp(0, 255).byte()
    worse = extract(efficientnet, noisy)
    kernel, error = kernel_distance(worse, b)
    assert kernel > 5 * error
    half = frechet_distance(Moments.of(a), Moments.of(b))
    assert frechet_distance(Moments.of(worse), Moments.of(b)) > 1.5 * half
    assert precision_recall(worse, b)[0] < 0.5 * precision_recall(a, b)[0]


def test_frechet_distance_detects_truncated_gray_levels(
    faces: torch.Tensor, halves: tuple[torch.Tensor, ...], efficientnet: EfficientNetLite0
) -> None:
    """Rounding restores images with errors of a fifth of a level; truncation does not.

    Truncation lowers every pixel by half a level on average, which adds (0.5 / 127.5)² for each of
    the 192 averages over a coarse grid and the 3 overall averages.
    """
    x = to_model(faces[:FACES])
    x = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 127.5
    truncated = ((x.clamp(-1, 1) + 1) * 127.5).byte()
    drawn = [images.permute(0, 2, 3, 1) for images in (to_uint8(x), truncated)]

    real = Moments.of(halves[0])
    right, wrong = (
        frechet_distance(Moments.of(extract(efficientnet, images)), real) for images in drawn
    )
    assert wrong > 2 * right

    pixels = PooledPixels()
    real, *others = (Moments.of(extract(pixels, images)) for images in (faces[:FACES], *drawn))
    right, wrong = (frechet_distance(other, real) for other in others)
    expected = 195 * (0.5 / 127.5) ** 2
    assert right < 0.02 * expected and 0.9 * expected < wrong < 1.3 * expected


# --- Inception ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_inception_matches_torch_fidelity(weights: Path, faces: torch.Tensor) -> None:
    extractor = Inception(str(weights)).train()
    assert not any(module.training for module in extractor.modules())
    reference = fidelity.FeatureExtractorInceptionV3(
        "reference", ["2048"], feature_extractor_weights_path=str(weights)
    )
    (expected,) = reference(faces[:3].permute(0, 3, 1, 2))
    actual = extract(extractor, faces[:3])
    assert actual.shape == (3, extractor.dim) == (3, 2048) and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    one = torch.cat([extract(extractor, face[None]) for face in faces[:3]])
    torch.testing.assert_close(one, actual, rtol=1e-4, atol=1e-6)
    # Flipped and transposed images have other features, so that no axes are exchanged.
    for image in (faces[:1].flip(1), faces[:1].flip(2), faces[:1].transpose(1, 2)):
        assert (extract(extractor, image) - actual[:1]).abs().max() > 1e-3 * actual.abs().max()


def test_metric_with_custom_weights_is_not_named_fid(weights: Path) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name = Inception(str(weights)).name
    assert name == f"inception-{digest[:8]}"
    assert metric_name("frechet", name, 5000) == "frechet_inception_5k"


def test_metric_names_contain_the_features_and_the_number_of_images() -> None:
    assert metric_name("frechet", features.INCEPTION, 50_000) == "fid_50k"
    assert metric_name("kernel", features.INCEPTION, 1234) == "kid_1234"
    assert metric_name("precision", features.INCEPTION, 1000) == "precision_inception_1k"
    assert metric_name("frechet", EfficientNetLite0.name, 256) == "frechet_efficientnet_256"
    assert metric_name("kernel", "dinov2-large-0a1b2c3d", 2000) == "kernel_dinov2_2k"


class Code:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("broken-in"),))


def test_unusable_weights_are_an_error_that_names_the_file(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.pth").write_bytes(weights.read_bytes()[:1000])
    Path("code.pth").write_bytes(pickle.dumps(Code()))
    torch.save({"a": torch.zeros(1)}, "other.pth")
    for make in (Inception, lambda weights: DINOv2("small", weights)):
        for name in ("short.pth", "code.pth", "other.pth"):
            with pytest.raises(ConfigError, match=rf"{name} cannot be used .*extractor\.weights="):
                make(weights=name)
        with pytest.raises(
            ConfigError, match=r"extractor\.weights=nowhere is not a file.*copy of"
        ):
            make(weights="nowhere")
    assert not Path("broken-in").exists()
    with pytest.raises(
        ValueError, match="size=huge is not allowed; it must be one of small, base, large"
    ):
        DINOv2("huge")


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("inception", "weights-inception-2015-12-05-6726825d.pth"),
        ("dinov2", "dinov2_vitl14_pretrain.pth"),
    ],
)
def test_failed_download_of_weights_names_their_url(
    option: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised when the callback is created from the configuration."""
    asked = []

    def download(url: str, path: str, **kwargs: object) -> None:
        asked.append((url, path))
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    callback = compose("train", [f"extractor={option}", "fid.every_n_steps=1"]).callbacks.fid
    with pytest.raises(ConfigError) as caught:
        instantiate(callback, "callbacks.fid")
    ((url, path),) = asked
    assert path == str(tmp_path / "hub" / "checkpoints" / name) and url.endswith(f"/{name}")
    for text in (path, url, "no route to host", "extractor.weights=<file>"):
        assert text in str(caught.value)


def test_downloaded_weights_are_cached_and_found(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, path: str, **kwargs: object) -> None:
        Path(path).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    name = Inception().name
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    assert Inception().name == name == Inception(str(weights)).name


# --- DINOv2 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit() -> dict[str, torch.Tensor]:
    """Random weights in the format of the authors, from which timm's are converted."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in network.state_dict().items()}
    return {"mask_token": torch.zeros(1, 384)} | state


def test_dinov2_matches_timm_on_the_resized_image(
    vit: dict[str, torch.Tensor], faces: torch.Tensor, tmp_path: Path
) -> None:
    """The position embedding is constant, so that interpolation does not change it."""
    vit = {**vit, "pos_embed": vit["pos_embed"][:, :1].expand(-1, 1370, -1).clone()}
    torch.save(vit, tmp_path / "vit.pth")
    extractor = DINOv2("small", str(tmp_path / "vit.pth")).train()
    assert not extractor.network.training
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    state = {k: v for k, v in vit.items() if k not in ("mask_token", "pos_embed")}
    network.load_state_dict(state | {"pos_embed": vit["pos_embed"][:, :257]})
    images = faces[:2].permute(0, 3, 1, 2).float() / 255
    images = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        expected = network((images - mean) / std)
    actual = extract(extractor, faces[:2])
    assert actual.shape == (2, extractor.dim) == (2, 384)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    digest = hashlib.sha256((tmp_path / "vit.pth").read_bytes()).hexdigest()
    assert extractor.name == f"dinov2-small-{digest[:8]}"


def test_position_embedding_is_interpolated_as_by_the_authors() -> None:
    """For a linear embedding, output i is the value at the position (i + ½) 37 / 16.1 - ½."""
    grid = torch.arange(37.0)
    embedding = torch.stack([grid[:, None].expand(37, 37), grid.expand(37, 37)], -1)
    token = torch.tensor([[[-5.0, -7.0]]])
    found = _positions(torch.cat([token, embedding.reshape(1, -1, 2)], 1))
    assert found.shape == (1, 257, 2) and found[:, :1].equal(token)
    rows, columns = found[0, 1:].reshape(16, 16, 2).unbind(-1)
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    inner = slice(1, 15)  # the kernel at the outer positions crosses the edge
    # The error of cubic convolution on a straight line is at most 0.05.
    torch.testing.assert_close(rows[inner, 7], places[inner], rtol=0, atol=0.05)
    torch.testing.assert_close(columns[7, inner], places[inner], rtol=0, atol=0.05)
    by_size = (torch.arange(16) + 0.5) * 37 / 16 - 0.5
    assert (by_size - rows[:, 7])[inner].max() > 0.15  # the positions of a plain resizing


# --- precision ----------------------------------------------------------------------------------


def test_features_are_float32_under_autocast() -> None:
    """TF32 is disabled during the extraction and restored afterwards."""
    seen = []

    class Linear(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cudnn.conv.fp32_precision,
                         torch.backends.cuda.matmul.fp32_precision))  # fmt: skip
            return super().forward(images.flatten(1).float() / 255)

    images = torch.randint(0, 256, (9, 4, 4, 3), dtype=torch.uint8)
    extractor = Linear(48, 7)
    expected = extract(extractor, images)
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = extract(extractor, images)
        half = extractor(images)
    assert half.dtype == torch.bfloat16 and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert seen[:4] == [("ieee", "ieee")] * 4
    assert before == (
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    )  # fmt: skip
    assert not actual.requires_grad
