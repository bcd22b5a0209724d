"""Kernel distance against explicit sums and torch-fidelity; its bias and standard error."""

import math

import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from diffusion_lab.metric import kernel_distance, kid


def normal(seed: int, n: int, d: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_kernel_distance_of_a_few_points_by_hand() -> None:
    """In one dimension, k(x, y) = (x y + 1)³."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [-2.0], [0.0]])
    xx, yy = 1.0, (-1.0 + 1.0 + 1.0) / 3
    xy = (3 * 1.0 + 8.0 - 1.0 + 1.0) / 6
    assert kernel_distance(x, y)[0] == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    with pytest.raises(ValueError, match="1 and 3 images are not enough"):
        kernel_distance(x[:1], y)


def test_kernel_distance_matches_torch_fidelity() -> None:
    """torch-fidelity uses random subsets; a single subset with all images is deterministic."""
    x, y = normal(0, 90, 7), 1.2 * normal(1, 90, 7, 0.3)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=90, verbose=False)
    expected = theirs["kernel_inception_distance_mean"]
    assert kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-10)


def test_chunks_do_not_change_the_kernel_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(0, 61, 5), normal(1, 47, 5, 0.2)
    whole = kernel_distance(x, y)
    monkeypatch.setattr(kid, "CHUNK", 100)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-11)


def test_kernel_distance_is_unbiased_with_a_correct_standard_error() -> None:
    """For equal distributions the mean over 200 pairs of sets is 0; otherwise it is the exact
    value.

    The mean of k over two independent normal variables with means a and b and unit variance (d =
    1) is E (x y + 1)³ = E[x³]E[y³] + 3 E[x²]E[y²] + 3 E[x]E[y] + 1.
    """
    found = torch.tensor(
        [kernel_distance(normal(s, 40, 1), normal(10_000 + s, 60, 1)) for s in range(200)]
    )
    value, error = found.unbind(1)
    std = value.std()
    assert abs(value.mean()) < 3 * std / 200**0.5
    assert 0.8 < error.square().mean().sqrt() / std < 1.6

    def mean(a: float, b: float) -> float:
        cubes = (a**3 + 3 * a) * (b**3 + 3 * b)
        return cubes + 3 * (a**2 + 1) * (b**2 + 1) + 3 * a * b + 1

    exact = mean(0, 0) + mean(1, 1) - 2 * mean(0, 1)
    found = torch.tensor(
        [kernel_distance(normal(s, 300, 1), normal(10_000 + s, 300, 1, 1.0)) for s in range(100)]
    )
    value, error = found.unbind(1)
    assert float(value.mean()) == pytest.approx(exact, abs=3 * float(value.std()) / 10)
    assert 0.8 < error.square().mean().sqrt() / value.std() < 1.25
    assert math.isnan(kernel_distance(normal(0, 19, 1), normal(1, 300, 1))[1])


@pytest.mark.parametrize("d", [1, 30])
def test_standard_error_is_that_of_a_jackknife(d: int) -> None:
    """Against the definition: the distance without each block of every tenth image."""
    x, y = normal(0, 63, d), normal(1, 48, d, 0.1)
    without = torch.tensor(
        [
            kernel_distance(*(torch.cat([z[j::10] for j in range(10) if j != k]) for z in (x, y)))[
                0
            ]
            for k in range(10)
        ]
    )
    expected = float((0.9 * (without - without.mean()).square().sum()).sqrt())
    assert kernel_distance(x, y)[1] == pytest.approx(expected, rel=1e-6)


def test_standard_error_of_a_good_model_is_not_too_large() -> None:
    """For equal distributions of many features, its mean is near the spread of the distance."""
    found = torch.tensor(
        [kernel_distance(normal(s, 200, 64), normal(10_000 + s, 200, 64)) for s in range(60)]
    )
    value, error = found.unbind(1)
    assert 0.8 < float(error.mean() / value.std()) < 1.5
