"""Sliced Wasserstein distance against closed forms and optimal assignment; total variation."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffusion_lab.metric import sliced_wasserstein, total_variation
from diffusion_lab.metric.distance import unit_vectors


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whitened(n: int, d: int) -> Tensor:
    """A set whose mean is exactly 0 and whose covariance is exactly I, along every direction."""
    x = normal(n, d)
    return torch.linalg.qr(x - x.mean(0)).Q * n**0.5


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_distance_between_a_set_and_its_scaled_copy(scale: float) -> None:
    """Every projection is scaled equally: SW_2 = |scale - 1| for any directions."""
    x = whitened(50, 7)
    shuffled = x[torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    for seed in (0, 1):
        distance = sliced_wasserstein(x, scale * shuffled, directions=3, seed=seed)
        assert float(distance) == pytest.approx(abs(scale - 1), abs=1e-12)


def test_distance_of_a_shift_is_its_norm_over_sqrt_d() -> None:
    """SW_2² = mean (vᵀ a)², which is |a|² / d for v uniform on the sphere."""
    x, shift = normal(20, 5), torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0]).double()
    distance = float(sliced_wasserstein(x, x + shift, directions=20_000))
    assert distance == pytest.approx(5 / 5**0.5, rel=0.02)  # the sampling error of v is 1.1%
    v = unit_vectors(64, 5, seed=3)
    expected = float((v @ shift).square().mean().sqrt())
    assert float(sliced_wasserstein(x, x + shift, 64, 3)) == pytest.approx(expected, rel=1e-12)


def test_distance_matches_the_optimal_assignment() -> None:
    x, y = normal(12, 3, seed=1), normal(12, 3, seed=2) ** 3
    total = 0.0
    for v in unit_vectors(16, 3, seed=0):
        cost = ((x @ v)[:, None] - (y @ v)[None]).square()
        rows, columns = linear_sum_assignment(cost.numpy())
        total += float(cost[rows, columns].mean()) / 16
    assert float(sliced_wasserstein(x, y, 16)) == pytest.approx(total**0.5, rel=1e-12)


def test_groups_are_compared_separately_and_images_as_vectors() -> None:
    x, y = normal(3, 10, 2, 4, seed=1), normal(3, 10, 2, 4, seed=2)
    together = sliced_wasserstein(x, y, groups=True)
    alone = [float(sliced_wasserstein(a, b)) for a, b in zip(x, y, strict=True)]
    flat = [float(sliced_wasserstein(a.flatten(1), b.flatten(1))) for a, b in zip(x, y)]  # noqa: B905
    assert together.tolist() == pytest.approx(alone, rel=1e-12)
    assert flat == pytest.approx(alone, rel=1e-12)
    assert max(alone) - min(alone) > 1e-3


def test_distance_of_float32_sets_is_summed_in_float64() -> None:
    x = (1e4 + whitened(50, 4)).float()
    assert float(sliced_wasserstein(x, x + 1)) == pytest.approx(
        float(sliced_wasserstein(x.double(), x.double() + 1)), rel=1e-12
    )


def test_sets_of_different_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(6, 2\)"):
        sliced_wasserstein(normal(5, 2), normal(6, 2))


def test_directions_are_uniform_and_depend_only_on_the_seed() -> None:
    v = unit_vectors(4000, 3, seed=0)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    # 4 standard errors.
    torch.testing.assert_close(v.mean(0), torch.zeros(3).double(), rtol=0, atol=0.035)
    torch.testing.assert_close(v.T @ v / 4000, torch.eye(3).double() / 3, rtol=0, atol=0.02)
    assert torch.equal(unit_vectors(10, 3, seed=0), v[:10])
    assert not torch.allclose(unit_vectors(10, 3, seed=1), v[:10])


def test_total_variation() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    assert total_variation(p, q).tolist() == pytest.approx([0.5, 0.0, 1.0])
