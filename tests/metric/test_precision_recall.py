"""Precision and recall by hand, by brute force, and against torch-fidelity."""

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusion_lab.metric import precision_recall


def normal(seed: int, n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def brute_force(x: torch.Tensor, centres: torch.Tensor, k: int) -> float:
    count = 0
    for point in x.double():
        for j, centre in enumerate(centres.double()):
            others = [float((centre - c).norm()) for i, c in enumerate(centres.double()) if i != j]
            if float((point - centre).norm()) <= sorted(others)[k - 1]:
                count += 1
                break
    return count / len(x)


def test_precision_and_recall_in_one_dimension_by_hand() -> None:
    """The real points 0, 1, 2, 10 with k = 1 have the balls [-1, 1], [0, 2], [1, 3], [2, 18]."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    drawn = torch.tensor([[-1.5], [-0.5], [2.5], [17.0], [19.0]])
    # Balls of the generated points: [-2.5, -0.5], [-1.5, 0.5], [-0.5, 5.5], [15, 19], [17, 21].
    # None contains 10.
    assert precision_recall(drawn, real, k=1) == (3 / 5, 3 / 4)
    with pytest.raises(ValueError, match="4 and 4 images; each set needs more than k=4"):
        precision_recall(real, real, k=4)


def test_missing_cluster_lowers_recall_and_wrong_one_lowers_precision() -> None:
    """One of two distant clusters is missing, or a wrong third one is added."""
    one, two, three = (normal(k, 100, 4) + shift for k, shift in ((0, 0), (1, 50), (2, -50)))
    again = normal(3, 100, 4)
    real = torch.cat([one, two])
    precision, recall = precision_recall(again, real)
    assert precision > 0.9 and 0.45 < recall <= 0.5
    precision, recall = precision_recall(torch.cat([again, three]), one)
    assert 0.45 < precision <= 0.5 and recall > 0.9


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_match_the_definition(
    monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    drawn, real = 1.3 * normal(0, 23, 5), normal(1, 31, 5)
    expected = (brute_force(drawn, real, k), brute_force(real, drawn, k))
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    monkeypatch.setitem(precision_recall.__globals__, "CHUNK", 70)  # chunks of two or three rows
    assert precision_recall(drawn, real, k) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_match_torch_fidelity() -> None:
    drawn, real = 1.2 * normal(0, 150, 8), normal(1, 200, 8)
    theirs = prc_features_to_metric(drawn.double(), real.double(), verbose=False)
    assert precision_recall(drawn, real) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-6
    )
