r"""LightningModule of diffusion training.

    x_t = α_t x_0 + σ_t ε,    loss = E w(t) |target(x_0, ε, t) - network(x_t, t)|².

t and ε of an image are drawn from the image's key, a function of (seed, split, epoch, dataset
index), and do not depend on the batch size, the number of devices or a resume. Only stratified
times depend on the global batch. In validation the times are spread evenly over the images, so
that the loss per noise level has a small variance.

So are the masks of the U-Net's dropout. Other networks may draw from torch's global generator,
which is seeded in every training step by (seed, epoch, batch, rank), so that a resumed run on as
many devices is exact as well.

A step whose loss or gradient is not finite is skipped.
"""

__all__ = ["DiffusionModule", "should_log"]

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from diffusion_lab.constraints import UnitInterval, checked
from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.loss import Loss
from diffusion_lab.nn.dropout import set_dropout_keys
from diffusion_lab.parameterization import Parameterization
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast
from diffusion_lab.timesteps import TimestepSampler, Uniform
from diffusion_lab.training.compatibility import check_model
from diffusion_lab.training.loss_bins import BINS, LossBins, bin_index, bin_name
from diffusion_lab.training.optimizer_settings import change_optimizer

log = logging.getLogger(__name__)

GOLDEN_RATIO = 0.6180339887498949  # the fractional parts of its multiples fill [0, 1) evenly


def should_log(trainer: Trainer, step: int) -> bool:
    """Returns whether a step writes a row of the log: every N-th step and the last."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return step % every == 0 or step == trainer.max_steps


class DiffusionModule(LightningModule):
    """Trains a network to denoise and holds the moving average (EMA) of its weights.

    Arguments:
        network: Maps (x_t, i), i DDPM's noise index, to a prediction of x_t's shape; see
            `NetworkDenoiser` for one that learns the variance.
        schedule: The noise schedule.
        parameterization: What the network predicts.
        loss: The loss weighting over noise levels.
        optimizer: Makes the optimizer from parameters.
        lr_schedule: Makes the learning-rate schedule from an optimizer and the number of steps.
        time: The distribution of t in training; uniform if None.
        label_dropout: Probability of replacing an image's class by "no class", so that a
            conditional network learns p(x_0) as well.
        run_config: The run's configuration as plain containers; saved with every checkpoint.

    Attributes:
        skipped: Whether the last optimizer step was skipped because loss or gradient was not
            finite; a bool tensor, on the device for a fused optimizer, otherwise on the CPU.

    Raises:
        ArgumentError: If an argument is not allowed.
        ConfigError: If only one of network and loss has a learned variance.
    """

    FORMAT = 1  # version of the entry that this module adds to a checkpoint

    @checked
    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        loss: Loss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer, int], LRScheduler],
        time: TimestepSampler | None = None,
        label_dropout: UnitInterval = 0.1,
        run_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_model(network, schedule, parameterization, loss, time or Uniform())
        self.network = network
        self.network_ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.schedule = schedule
        self.parameterization = parameterization
        self.loss, self.time = loss, time or Uniform()
        self.label_dropout = label_dropout
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.run_config = run_config or {}
        self._step_losses: list[Tensor] = []  # of the micro-batches of one optimizer step
        self._loss_bins = LossBins()
        self.skipped = torch.zeros((), dtype=torch.bool)
        self._grad_norm: Tensor | None = None  # of the last gradient, before clipping
        self.val_loss = MeanMetric()
        self.val_loss_ema = MeanMetric()
        self.val_loss_bin = nn.ModuleList(MeanMetric() for _ in range(BINS))
        # DDP would broadcast the schedule's tables, which never change, in every step.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if not name.startswith("network.")
        ]

    def train(self, mode: bool = True) -> "DiffusionModule":
        """Sets the training mode, except of the averaged network."""
        super().train(mode)
        self.network_ema.eval()
        return self

    def denoiser(self, ema: bool = True, label: Tensor | None = None) -> NetworkDenoiser:
        """Returns the denoiser E[x_0 | x_t].

        Arguments:
            ema: Whether it uses the averaged weights or the raw ones.
            label: The class; None means no class.
        """
        network = self.network_ema if ema else self.network
        return NetworkDenoiser(network, self.schedule, self.parameterization, label)

    def setup(self, stage: str) -> None:
        """Checks that the network has as many classes as the data.

        Raises:
            ConfigError: If the numbers differ.
        """
        data = getattr(self.trainer, "datamodule", None)
        own, expected = getattr(self.network, "classes", 0), len(getattr(data, "classes", ()))
        if data is not None and own != expected:
            raise ConfigError(
                f"network.classes={own}, but the images have {expected} classes "
                f"(data.label={getattr(data, 'label', None)}); set network.classes={expected}"
                + ("" if expected else ", or data.label")
            )

    def _losses(
        self, x_0: Tensor, t: Tensor, epsilon: Tensor, ema: bool, label: Tensor | None = None
    ) -> Tensor:
        """The losses of a batch, of shape (B,)."""
        alpha_t, sigma_t = (broadcast(c, x_0) for c in self.schedule(t))
        x_t = alpha_t * x_0 + sigma_t * epsilon
        target = self.parameterization.target(x_0, epsilon, alpha_t, sigma_t)
        output, variance = self.denoiser(ema, label).outputs(x_t, t)
        learned = () if variance is None else (variance, x_0)
        losses: Tensor = self.loss(
            output, target, self.schedule, self.parameterization, t, *learned
        )
        return losses

    def on_train_start(self) -> None:
        """Checks the number of batches per step.

        Raises:
            ConfigError: If an epoch has fewer batches than are accumulated: Lightning ends a step
                at the end of an epoch.
        """
        accumulated = self.trainer.accumulate_grad_batches
        batches = self.trainer.num_training_batches
        if accumulated > batches and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulated} is more than the {batches} batches"
                " of an epoch, at whose end a step ends; lower it, or data.batch_size"
            )
        if batches != float("inf") and (rest := int(batches) % accumulated):
            log.warning(
                "trainer.accumulate_grad_batches=%d does not divide the %d batches of an epoch: "
                "its last step has the gradient of %d batches",
                accumulated, batches, rest,
            )  # fmt: skip

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seeds torch's global generator."""
        seed, epoch, rank = self.run_config.get("seed", 0), self.current_epoch, self.global_rank
        torch.manual_seed(int(make_key(seed, "global", epoch, batch_idx, rank)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean loss of a batch, weighted for unequal numbers of images."""
        x_0, generator = batch["x_0"], KeyedGenerator(batch["key"])
        u = generator.uniform().double()
        u = batch["stratum"] if self.time.stratified else u
        t, factor = self.time(u, self.schedule)
        epsilon = generator.normal(*x_0.shape[1:])
        label = self._label(batch)
        set_dropout_keys(self.network, batch["key"])
        losses = factor.to(x_0) * self._losses(x_0, t, epsilon, ema=False, label=label)
        # DDP averages the gradients; with the weight, that is the mean over the global batch.
        loss = losses.mean() * batch["weight"]
        self._loss_bins.update(u, losses.detach())
        self._step_losses.append(loss.detach())
        # A non-finite loss makes the gradient non-finite, and so the average over the devices:
        # all of them skip the step.
        guarded: Tensor = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        return guarded

    def _label(self, batch: dict[str, Any]) -> Tensor | None:
        """The classes of a batch; some are replaced by the label K, no class."""
        if "label" not in batch:
            return None
        u = KeyedGenerator(make_key(batch["key"], "label")).uniform()
        no_class: Any = self.network.classes
        return torch.where(u < self.label_dropout, no_class, batch["label"])

    def _log_loss(self) -> None:
        """Logs the mean loss over all images of an optimizer step."""
        if should_log(self.trainer, self.trainer.global_step + 1):
            loss = torch.stack(self._step_losses).mean()
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
            self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self._step_losses.clear()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skips the step if its gradient is not finite, and logs the row of the step.

        A fused optimizer reads the flag on the device, as from a gradient scaler, without
        synchronization. Other optimizers skip parameters without a gradient; for them the flag is
        copied to the host, one synchronization per step.
        """
        self._log_loss()
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = self._grad_norm = nn.utils.get_total_norm(gradients)
        self.skipped = ~norm.isfinite()
        if all(group.get("fused") for group in groups):
            optimizer.found_inf = self.skipped.float()  # type: ignore[attr-defined]  # by torch
        else:
            self.skipped = self.skipped.cpu()
            if self.skipped:
                optimizer.zero_grad(set_to_none=True)
        if should_log(self.trainer, self.trainer.global_step + 1):
            values = {"train/grad_norm": norm, "train/lr": groups[0]["lr"]}
            values |= self._loss_bins.finish_row(self._loss_sums())
            self.log_dict(values, batch_size=1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient, reusing its norm from `on_before_optimizer_step`."""
        own = gradient_clip_algorithm in (None, "norm")
        if not own or getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and self._grad_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._grad_norm)

    def _loss_sums(self) -> Tensor:
        """The sums and numbers of the losses in each bin over all devices, of shape (2, BINS)."""
        sums = self._loss_bins.sums(self.trainer.is_global_zero).to(self.device)
        reduced: Tensor = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return reduced

    def _bin_metrics(self) -> list[MeanMetric]:
        """The metrics of `val_loss_bin`, with their type."""
        return [metric for metric in self.val_loss_bin if isinstance(metric, MeanMetric)]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Updates the validation losses of the raw and of the averaged weights."""
        x_0 = batch["x_0"]
        u = ((batch["index"].double() + 0.5) * GOLDEN_RATIO) % 1.0
        t, factor = self.time(u, self.schedule)
        epsilon = KeyedGenerator(batch["key"]).normal(*x_0.shape[1:])
        label = batch.get("label")
        raw, averaged = (
            factor.to(x_0) * self._losses(x_0, t, epsilon, ema=ema, label=label)
            for ema in (False, True)
        )
        self.val_loss.update(raw)
        self.val_loss_ema.update(averaged)
        index = bin_index(u)
        for k, metric in enumerate(self._bin_metrics()):
            inside = index == k
            if inside.any():
                metric.update(averaged[inside])
        self.log("val/loss", self.val_loss, batch_size=len(x_0))
        self.log("val/loss_ema", self.val_loss_ema, batch_size=len(x_0), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the loss of the averaged weights per noise level."""
        for k, metric in enumerate(self._bin_metrics()):
            self.log(f"val/loss_bin/{bin_name(k)}", metric.compute())
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Makes the optimizer and the learning-rate schedule, which is updated every step."""
        optimizer = self.make_optimizer(self.network.parameters())
        lr_schedule = self.make_lr_schedule(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": lr_schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration, from which `load_run` builds the network, and the loss sums."""
        data = self._trainer and getattr(self.trainer, "datamodule", None)
        sums = self._loss_sums() if self._trainer else self._loss_bins.sums()
        checkpoint["diffusion_lab"] = {
            "format": self.FORMAT,
            "config": self.run_config,
            "classes": list(getattr(data, "classes", ())),
            "loss_bins": self._loss_bins.state_dict(sums),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the loss sums since the last row of the log.

        Settings of the optimizer that differ from those of the checkpoint's run are applied; the
        optimizer itself would restore the old ones.
        """
        self._match_memory_format(checkpoint.get("optimizer_states", ()))
        saved = checkpoint.get("diffusion_lab", {})
        before, after = (
            config.get("optimizer") or {} for config in (saved.get("config", {}), self.run_config)
        )
        changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
        if before and changed:
            change_optimizer(checkpoint, self.make_optimizer(self.network.parameters()), changed)
        if bins := saved.get("loss_bins"):
            self._loss_bins.load_state_dict(bins)

    def _match_memory_format(self, optimizer_states: Iterable[dict[str, Any]]) -> None:
        """Copies an optimizer's state into the memory format of its parameters.

        A fused optimizer reads both in memory order and does not check that it is the same. It
        differs if the checkpoint is of a network that was not channels_last.
        """
        parameters = list(self.network.parameters())
        for optimizer in optimizer_states:
            for k, values in optimizer["state"].items():
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameters[k].shape:
                        values[name] = torch.empty_like(
                            parameters[k], dtype=value.dtype, device=value.device
                        ).copy_(value)
