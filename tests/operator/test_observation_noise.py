"""Noise models: exact quantiles and moments, and reproducible draws for given keys."""

import numpy as np
import pytest
import scipy.stats
import torch

from diffusion_lab.operator import Gaussian, Poisson
from diffusion_lab.operator.noise_model import poisson_quantile
from diffusion_lab.rng import KeyedGenerator, make_key


def keyed(rows: list[int]) -> KeyedGenerator:
    return KeyedGenerator(make_key(0, "noise", torch.tensor(rows)))


@pytest.mark.parametrize("mean", [0.0, 1e-9, 1e-3, 0.3, 1.0, 4.7, 30.0, 255.0, 1e4, 1e6])
def test_poisson_quantile_matches_scipy(mean: float) -> None:
    z = torch.linspace(-6.6, 6.6, 1999, dtype=torch.float64)
    counts = poisson_quantile(z, torch.full_like(z, mean))
    expected = scipy.stats.poisson.ppf(scipy.stats.norm.cdf(z.numpy()), mean).clip(0)
    differences = np.abs(counts.numpy() - expected)
    # For 1e6 photons, rounding in either program may change a count by one.
    assert differences.max() <= (mean > 1e5) and (differences > 0).mean() < 1e-3


@pytest.mark.parametrize("noise", [Gaussian(0.3), Poisson(12.0)], ids=["gaussian", "poisson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noise_is_a_function_of_the_keys(noise, dtype: torch.dtype) -> None:
    clean = torch.linspace(-1, 1, 3 * 8, dtype=dtype).reshape(3, 2, 4)
    y = noise.draw(clean, keyed([0, 1, 2]))
    assert y.dtype == dtype and y.shape == clean.shape
    assert torch.equal(noise.draw(clean[[2, 0]], keyed([2, 0])), y[[2, 0]])
    assert not torch.equal(noise.draw(clean, keyed([0, 1, 3]))[2], y[2])
    one, same = (noise.draw(clean, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, same)


def test_gaussian_noise_has_its_standard_deviation() -> None:
    clean = torch.full((4, 10_000), 0.3, dtype=torch.float64)
    n = (Gaussian(0.2).draw(clean, keyed([0, 1, 2, 3])) - clean) / 0.2
    assert float(n.mean()) == pytest.approx(0, abs=0.02)  # four standard errors
    assert float(n.std()) == pytest.approx(1, abs=0.015)
    assert torch.equal(Gaussian(0.0).draw(clean), clean)
    assert Gaussian(0.2).std(clean) == 0.2


def test_poisson_noise_counts_photons() -> None:
    rate = 40.0
    clean = torch.tensor([-1.2, -1.0, 0.5, 1.0]).double()[:, None].expand(4, 10_000)
    y = Poisson(rate).draw(clean, keyed([0, 1, 2, 3]))
    counts = rate * (y + 1) / 2
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-10)
    assert not bool(counts[:2].any())  # no photons without light
    for k, mean in ((2, 30.0), (3, 40.0)):
        assert float(counts[k].mean()) == pytest.approx(mean, abs=4 * (mean / 1e4) ** 0.5)
        assert float(counts[k].var()) == pytest.approx(mean, rel=0.06)


def test_std_of_poisson_noise_matches_its_variance() -> None:
    clean = torch.full((1, 20_000), 0.6, dtype=torch.float64)
    noise = Poisson(100.0)
    y = noise.draw(clean, keyed([5]))
    std = noise.std(y)
    assert std.shape == y.shape
    assert float((std**2).mean()) == pytest.approx(float((y - clean).square().mean()), rel=0.05)
    assert float(noise.std(torch.tensor([0.62]))) == pytest.approx(2 / 100 * 81**0.5)
    assert noise.std(torch.tensor([-1.0, -1.5])).tolist() == pytest.approx([0.02, 0.02])


def test_invalid_settings_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"sigma_y=-0\.1.*a number >= 0"):
        Gaussian(-0.1)
    with pytest.raises(ValueError, match=r"rate=0\.0.*a number > 0"):
        Poisson(0.0)
