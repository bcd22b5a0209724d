r"""Averages of the weights over training, which sampling and evaluation use.

The exponential moving average, stored in the module,

    θ' <- d_n θ' + (1 - d_n) θ,    d_n = min(d, (1 + n) / (10 + n)),    after the n-th step.

The ramp forgets the initial weights quickly; without it, samples with a decay of 0.9999 are noise
at 10,000 steps. n is the step of the trainer, so that the weights are the only state. Skipped
steps change no average.

The power-function averages, of which snapshots are written,

    θ̂ <- β_n θ̂ + (1 - β_n) θ,    β_n = (1 - 1/n)^(γ+1);

`diffusion_lab.training.post_hoc_ema` reconstructs averages of any other width from the snapshots.

Sources:
    Song et al., "Score-based generative modeling through SDEs", 2021, code (the ramp).
    Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024,
    section 3 (the power function).
"""

__all__ = ["EMA", "PowerEMA"]

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion_lab.callback.trainer_state import diffusion_module, is_debug_run
from diffusion_lab.constraints import Decay, Distinct, NonEmptyStr, PositiveInt, checked
from diffusion_lab.errors import RunError
from diffusion_lab.training.post_hoc_ema import Width, gamma_of_width, save_snapshot, snapshots


def _move(averages: list[Tensor], values: list[Tensor], fraction: float, skipped: Tensor) -> None:
    """Moves averages towards the values by a fraction, unless the step was skipped."""
    if skipped.device.type == "cpu":
        if not skipped:
            torch._foreach_lerp_(averages, values, fraction)
    else:
        _move_by_flag(averages, values, fraction, skipped)


def _move_by_flag(
    averages: list[Tensor], values: list[Tensor], fraction: float, skipped: Tensor
) -> None:
    """The same with a flag on the device, without synchronization."""
    change = torch._foreach_sub(values, averages)
    torch._foreach_mul_(change, fraction * ~skipped)
    torch._foreach_add_(averages, change)


class EMA(Callback):
    """Updates `module.network_ema` after each step of the optimizer. Buffers are not averaged.

    Arguments:
        decay: The decay d.
    """

    @checked
    def __init__(self, decay: Decay = 0.9999) -> None:
        self.decay = decay
        self.step = 0
        self.averages: list[Tensor] = []
        self.parameters: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module = diffusion_module(module)
        self.step = trainer.global_step
        # Listed once, because the search through all modules takes longer than the update.
        self.averages = list(module.network_ema.parameters())
        self.parameters = list(module.network.parameters())

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = diffusion_module(module)
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = n = trainer.global_step
        decay = min(self.decay, (1 + n) / (10 + n))
        _move(self.averages, self.parameters, 1 - decay, module.skipped)


class PowerEMA(Callback):
    """Keeps one power-function average of the parameters for each width, and writes snapshots.

    The averages are float32, on the device of the parameters, part of every checkpoint, and
    written to <directory>/<step>.safetensors every N steps and at the end. A resumed run removes
    later snapshots, which can be of a training with other settings, and writes them again. Buffers
    are not averaged.

    Arguments:
        directory: Directory of the snapshots.
        widths: The relative widths σ_rel, in [0.01, 0.28]; an empty list disables the callback.
        every_n_steps: The number of optimizer steps from one snapshot to the next, >= 1.

    Raises:
        ValueError: If a width or the number of steps is not allowed.
        RunError: If a run is resumed with other widths, or without its averages.
    """

    @checked
    def __init__(
        self,
        directory: NonEmptyStr,
        widths: Annotated[Sequence[Width], Distinct()] = (0.05, 0.1),
        every_n_steps: PositiveInt = 1000,
    ) -> None:
        self.directory = Path(directory)
        self.widths = [float(width) for width in widths]
        self.gammas = [gamma_of_width(width) for width in self.widths]
        self.every_n_steps = every_n_steps
        self.step = self.written_step = 0
        self.averages: dict[float, dict[str, Tensor]] = {}  # by width and by parameter
        self.parameters: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages and their step; empty without averages."""
        if not self.averages:
            return {}
        # A list, because widths are numbers and the keys of a dictionary should be strings.
        return {
            "step": self.step,
            "widths": list(self.averages),
            "averages": [dict(average) for average in self.averages.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.averages = {
            width: {name: tensor.clone() for name, tensor in average.items()}
            for width, average in zip(state["widths"], state["averages"], strict=True)
        }

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module = diffusion_module(module)
        n = trainer.global_step
        # The names in a compiled network have the prefix.
        parameters = {
            name.replace("_orig_mod.", ""): parameter.detach()
            for name, parameter in module.network.named_parameters()
        }
        if not self.widths:
            self.averages = {}  # those of the checkpoint
            return
        if n == 0:
            self.averages = {
                width: {k: p.float().clone() for k, p in parameters.items()}
                for width in self.widths
            }
        else:
            self._check(n, parameters)
            self.averages = {
                width: {k: self.averages[width][k].to(p.device) for k, p in parameters.items()}
                for width in self.widths
            }
        self.step = self.written_step = n
        self.parameters = list(parameters.values())
        if trainer.is_global_zero and not is_debug_run(trainer):
            for step, path in snapshots(self.directory).items():
                if step > n:
                    path.unlink()

    def _check(self, step: int, parameters: dict[str, Tensor]) -> None:
        """Raises RunError unless the averages started at the first step of the training."""
        saved = sorted(self.averages)
        if saved != sorted(self.widths) or self.step != step:
            holds = f"those of {saved} after step {self.step}" if saved else "none"
            way_out = f"ema.widths={saved}, or to keep none with " if saved else ""
            raise RunError(
                f"ema.widths={self.widths} need averages from the first step on, and the "
                f"checkpoint of step {step} holds {holds}; resume with {way_out}ema.widths=[]"
            )
        for average in self.averages.values():
            if {k: t.shape for k, t in average.items()} != {
                k: p.shape for k, p in parameters.items()
            }:
                raise RunError(
                    "the averages of ema.widths in the checkpoint do not fit the network's "
                    "parameters; resume with ema.widths=[]"
                )

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = diffusion_module(module)
        n = trainer.global_step
        if not self.widths or n == self.step:  # gradients are still being accumulated
            return
        self.step = n
        parameters = [parameter.float() for parameter in self.parameters]
        for width, gamma in zip(self.widths, self.gammas, strict=True):
            beta = (1 - 1 / n) ** (gamma + 1)
            _move(list(self.averages[width].values()), parameters, 1 - beta, module.skipped)
        if n % self.every_n_steps == 0 or n == trainer.max_steps:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.widths and self.step != self.written_step:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self.written_step = self.step
        if trainer.is_global_zero and not is_debug_run(trainer):
            save_snapshot(self.directory, self.step, self.averages)
