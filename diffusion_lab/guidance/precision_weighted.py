r"""Exact E[x_0 | x_t, y] of a noisy image by precision weighting, for any prior.

x_t / α_t and y are observations of x_0 with independent noise, of variance r_t² = σ_t² / α_t² and
σ_y². Their mean, weighted by the precisions, is a sufficient statistic for x_0,

    u = (x_t / α_t / r_t² + y / σ_y²) / p,    p = 1 / r_t² + 1 / σ_y²,

and is x_0 with noise of variance 1 / p. One call of the denoiser at the level t' with
r_{t'}² = 1 / p is therefore enough:

    E[x_0 | x_t, y] = E[x_0 | x_{t'} = α_{t'} u].

The level t' is below t and below the level of y. Where σ_y is small it is below t_min, the lowest
level of training. The denoiser is called at t' even then, because a higher level would remove
details that u contains. `NetworkDenoiser` passes the smallest index that its network knows;
regardless of the network's output, the estimate stays within the small noise of u.

The method samples the same posterior as `TruncatedReverseSDE`, but starts from pure noise and
needs more steps. It is the reference for methods that start there.
"""

__all__ = ["PrecisionWeighted"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.tensor import broadcast


class PrecisionWeighted(Guided):
    """Precision-weighted mean of x_t / α_t and y: one call of the denoiser per step."""

    requires = "identity"

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        schedule, y, sigma_y = denoiser.schedule, observation.y, float(observation.sigma_y)
        ratio, (alpha_t, _) = schedule.ratio(t), schedule(t.double())
        weight = 1 / (1 + (ratio / sigma_y) ** 2)  # of x_t / α_t in u
        # The level is always within the schedule, so that no check has to wait for the device.
        t_u = schedule.t_from_ratio(ratio * weight.sqrt(), check=False)
        alpha_u, _ = schedule(t_u)
        x_u = broadcast(alpha_u * weight / alpha_t, x_t) * x_t
        x_u = x_u + broadcast(alpha_u * (1 - weight), x_t) * y
        denoised: Tensor = denoiser(x_u, t_u)
        return denoised
