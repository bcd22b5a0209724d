r"""RED-diff: a variational approximation of the posterior by one point, found by Adam.

The posterior is approximated by N(μ, 0). With x_t = α_t μ + σ_t ε, one Adam step is made at each
time t, from the noisiest to the cleanest, on

    L(μ) = d/m ½ ‖y - A(μ)‖² + λ r_t sg[ε̂(x_t) - ε]ᵀ μ,    r_t = σ_t / α_t,

where d and m are the sizes of x_0 and y and sg stops gradients. Because r_t (ε̂ - ε) = μ - x̂(x_t),
the gradient is that of regularization by denoising (RED),

    ∇L = d/m ∂Aᵀ (A(μ) - y) + λ (μ - x̂(x_t)),

without a large factor at any level. (It is d times the paper's loss, which averages over elements;
Adam is invariant to the factor.) It does not depend on σ_y: λ weights the prior against y. The
start is

    μ = E[x_0 | y] for x_0 ~ N(0, I),    with coefficients ȳ_i / (1 + ν_i²) (see `Spectrum`),

which equals the paper's A⁺ y where y has no noise. With noise, A⁺ of a blur would amplify it a
thousandfold, and Adam would not recover.

The result is one image, near a mode, not a sample: repeated calls differ only by the noise of the
optimization, and this spread has no meaning. For a Gaussian prior N(m, C) the fixed point at level
r satisfies d/m Aᵀ (A μ - y) + λ r² (C + r²)⁻¹ (μ - m) = 0.

Source:
    Mardani, Song, Kautz, Vahdat, "A variational perspective on solving inverse problems with
    diffusion models", 2024, algorithm 1.
"""

__all__ = ["REDDiff", "REDDiffSampler", "red_gradient"]

import logging

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegative, Positive, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.data_step import data_fidelity_grad
from diffusion_lab.guidance.linear_solve import pull_back
from diffusion_lab.operator import LinearOperator, SVDOperator
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.transition import transition

log = logging.getLogger(__name__)


def red_gradient(
    observation: Observation, mu: Tensor, denoised: Tensor, prior_weight: float
) -> Tensor:
    """Returns ∇L at μ, of shape (B, *), independently for each row.

    Arguments:
        observation: y and A.
        mu: μ, of shape (B, *).
        denoised: x̂(x_t).
        prior_weight: λ.
    """
    balance = mu[0].numel() / observation.y[0].numel()
    return balance * data_fidelity_grad(observation, mu) + prior_weight * (mu - denoised)


class REDDiffSampler(Sampler):
    """The steps of `REDDiff`, for one call: it holds μ and the moments of Adam.

    Arguments:
        like: The sampler whose number of steps, grid and clipping are taken.
        observation: The observation.
        mu: The initial μ.
        prior_weight: λ.
        lr: The step size of Adam.
    """

    stochastic = False

    def __init__(
        self, like: Sampler, observation: Observation, mu: Tensor, prior_weight: float, lr: float
    ) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.observation, self.mu, self.prior_weight = observation, mu, prior_weight
        # Adam scales each element separately, so that no row depends on another.
        self.optimizer = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        mu = self.mu
        mu.grad = red_gradient(self.observation, mu, state.denoised, self.prior_weight)
        self.optimizer.step()
        if s == 0:
            return mu.clone()
        step = transition(denoiser.schedule, state.t, s)
        return step.alpha_s * mu + step.sigma_s * noise(mu)


class REDDiff(Guidance):
    """RED-diff: one image that fits y and its own denoised version; not a posterior sample.

    One call of the network per step. It starts from zero where A is not linear.

    Arguments:
        prior_weight: The weight λ of the prior against y.
        lr: The step size of Adam, in the units of x_0.
    """

    stochastic = False
    allows_noiseless = True
    uses_step = False

    @checked
    def __init__(self, prior_weight: NonNegative = 0.25, lr: Positive = 0.1) -> None:
        self.prior_weight, self.lr = prior_weight, lr

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        log.warning(
            "REDDiff gives one image for each observation, not a posterior; its spread has no "
            "meaning. Use guidance=pnpdm, guidance=daps or guidance=mmps for samples"
        )
        operator, z = observation.operator, observation.noise(generator)
        mu = torch.zeros_like(z)
        if isinstance(operator, SVDOperator):
            mu = operator.v(observation.spectrum.proximal(operator.vt(mu), 1.0))
        elif isinstance(operator, LinearOperator):
            one = torch.ones((), dtype=torch.float64)
            mu = pull_back(operator, observation.y, one, float(observation.sigma_y))
        alpha, sigma = (c.to(z) for c in denoiser.schedule(torch.ones((), dtype=torch.float64)))
        method = REDDiffSampler(sampler, observation, mu, self.prior_weight, self.lr)
        return method(denoiser, alpha * mu + sigma * z, generator=generator, callback=callback)
