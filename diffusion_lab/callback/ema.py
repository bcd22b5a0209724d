r"""The exponential moving average of the weights, which sampling and evaluation use.

    θ' <- d_n θ' + (1 - d_n) θ,    d_n = min(d, (1 + n) / (10 + n)),    after the n-th step.

The ramp forgets the initial weights quickly; without it a decay of 0.9999 gives noise at 10,000
steps. n is the trainer's own step, so there is no state to save beyond the weights.

Source:
    Song et al., "Score-based generative modeling through SDEs", 2021, code (the ramp).
"""

__all__ = ["EMA"]

from typing import Any

import torch
from lightning import Callback, Trainer

from diffusion_lab.module import DiffusionModule


class EMA(Callback):
    """Updates `module.network_ema` after each step of the optimizer. Buffers are not averaged.

    Arguments:
        decay: The decay d in [0, 1).

    Raises:
        ValueError: If d is outside [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not allowed; it lies in [0, 1)")
        self.decay = decay
        self.step = 0

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = n = trainer.global_step
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(
            list(module.network_ema.parameters()), list(module.network.parameters()), 1 - decay
        )
