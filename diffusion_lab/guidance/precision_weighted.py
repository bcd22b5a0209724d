r"""The fused denoiser: E[x_0 | x_t, y] exactly, for a noisy image and any prior.

x_t / α_t and y are two looks at x_0 with independent noise, of variance r_t² = σ_t² / α_t² and
σ_y². What they say of x_0 is all in their mean, weighted by the precisions,

    u = (x_t / α_t / r_t² + y / σ_y²) / p,    p = 1 / r_t² + 1 / σ_y²,

which is x_0 with noise of variance 1 / p. So one call of the denoiser at the fused level t',
where r_{t'}² = 1 / p, is enough:

    E[x_0 | x_t, y] = E[x_0 | x_{t'} = α_{t'} u].

The fused level is below both, and so below t_min where σ_y is small: below all that a network was
trained at. The denoiser is asked there all the same, at the level that u really has; a higher one
would smooth away what u shows. `NetworkDenoiser` tells its network the smallest index that it
knows, and whatever that answers, the estimate is u to within the tiny noise of u.

It samples what `Truncated` samples, from pure noise and so in more steps; it is the reference for
methods that start there.
"""

__all__ = ["Fused"]

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.tensor import broadcast


class Fused(Guided):
    """One call of the denoiser, at the level that x_t and y have together."""

    requires = "identity"

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return _Fused(denoiser, observation)


class _Fused(Conditional):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        schedule, ratio = self.schedule, self.schedule.ratio(t)
        alpha_t, _ = schedule(t.double())
        sigma_y = float(self.sigma_y)
        share = 1 / (1 + (ratio / sigma_y) ** 2)  # of x_t / α_t in u
        # Always within the schedule, so that there is no need to wait for the device.
        t_fused = schedule.t_from_ratio(ratio * share.sqrt(), check=False)
        alpha, _ = schedule(t_fused)
        noisy = broadcast(alpha * share / alpha_t, x_t) * x_t
        return self.denoiser(noisy + broadcast(alpha * (1 - share), x_t) * self.y, t_fused)
