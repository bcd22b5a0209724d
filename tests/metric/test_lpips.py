"""LPIPS: agreement with torchmetrics, without a download."""

from pathlib import Path

import pytest
import torch
import torchvision
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from diffusion_lab.metric import find_lpips
from diffusion_lab.metric.lpips import MIN_SIZE


def test_find_lpips_matches_torchmetrics_if_the_weights_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert find_lpips() is None
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    name = torchvision.models.AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "checkpoints" / name)
    lpips = find_lpips()
    assert lpips is not None
    a, b = 2 * torch.rand(2, 3, 3, MIN_SIZE, MIN_SIZE) - 1
    expected = learned_perceptual_image_patch_similarity(a, b, net_type="alex", reduction="none")
    torch.testing.assert_close(lpips(a, b), expected.flatten())
    assert float(lpips(a, b).min()) > 0 and bool((lpips(a, a) == 0).all())
    torch.testing.assert_close(lpips(a * 3, b), lpips((a * 3).clamp(-1, 1), b))
