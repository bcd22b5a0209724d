"""Linear-Gaussian trajectories: the posterior agrees with a Kalman smoother."""

import numpy as np
import torch

from diffusion_lab.analytic import Gaussian, damped_spring, trajectory


def smoother(
    y: np.ndarray, seen: list[int], transition, noise, start, length: int, sigma_y: float
) -> tuple[np.ndarray, np.ndarray]:
    """Means (L, n) and covariances (L, n, n) by a forward filter and a backward smoother.

    See Rauch, Tung and Striebel, 1965. Component 0 of the state is observed at the times `seen`.
    """
    f, q, p_0 = (np.asarray(m) for m in (transition, noise, start))
    n = len(f)
    h = np.eye(n)[:1]
    means, covariances, predicted = [], [], []
    m, p = np.zeros(n), p_0
    for k in range(length):
        if k:
            m, p = f @ m, f @ p @ f.T + q
        predicted.append((m, p))
        if k in seen:
            gain = p @ h.T / (h @ p @ h.T + sigma_y**2)
            m = m + (gain * (y[seen.index(k)] - h @ m))[:, 0]
            p = p - gain @ h @ p
        means.append(m)
        covariances.append(p)
    for k in reversed(range(length - 1)):
        g = covariances[k] @ f.T @ np.linalg.inv(predicted[k + 1][1])
        means[k] = means[k] + g @ (means[k + 1] - predicted[k + 1][0])
        covariances[k] = covariances[k] + g @ (covariances[k + 1] - predicted[k + 1][1]) @ g.T
    return np.array(means), np.array(covariances)


def test_posterior_matches_a_kalman_smoother() -> None:
    spring, model = damped_spring(12)
    prior = Gaussian(spring.means[0], spring.covariances[0])
    seen, sigma_y = [0, 3, 4, 9], 0.2
    rows = torch.eye(24, dtype=torch.float64)[[2 * k for k in seen]]
    y = torch.tensor([0.5, -1.2, -0.8, 0.3], dtype=torch.float64)
    posterior = prior.posterior(y, rows, sigma_y)
    means, covariances = smoother(y.numpy(), seen, *model, 12, sigma_y)
    np.testing.assert_allclose(posterior.means[0].reshape(12, 2).numpy(), means, atol=1e-10)
    blocks = posterior.covariances[0].reshape(12, 2, 12, 2).diagonal(dim1=0, dim2=2)
    np.testing.assert_allclose(blocks.permute(2, 0, 1).numpy(), covariances, atol=1e-10)


def test_samples_follow_the_dynamics() -> None:
    """z_{k+1} - F z_k is distributed as N(0, Q) and is uncorrelated with z_k."""
    f = torch.tensor([[0.9, 0.3], [-0.2, 0.7]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.05], [0.05, 0.1]], dtype=torch.float64)
    prior = trajectory(f, q, torch.eye(2), 6)
    z = prior.sample(40000, torch.Generator().manual_seed(0))
    assert z.shape == (40000, 6, 2)
    kick = (z[:, 1:] - z[:, :-1] @ f.T).flatten(0, 1)
    torch.testing.assert_close(kick.T.cov(), q, atol=3e-3, rtol=0)
    before = z[:, :-1].flatten(0, 1)
    assert float((kick.T @ before / len(kick)).abs().max()) < 5e-3


def test_damped_spring_is_stationary() -> None:
    spring, _ = damped_spring(10)
    assert torch.allclose(spring.covariances[0].diagonal(), torch.ones(20, dtype=torch.float64))
