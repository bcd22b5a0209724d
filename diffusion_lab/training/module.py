r"""The LightningModule: draw t and ε, predict, take the loss; and nothing else.

    x_t = α_t x_0 + σ_t ε,    loss = E w(t) |target(x_0, ε, t) - network(x_t, t)|².

t and ε of an image are drawn from the key that comes with it, a function of (seed, split, epoch,
dataset index): the same whatever the batch size, the number of devices or a resume. Stratified
times alone belong to the global batch. In validation the times are spread evenly over the images,
so that the loss per noise level has little variance.

The loss per noise level is that of ten bins which training times fall into equally often: bin
k / 10 holds the u, and so the noise levels, from the (k - 1)-th to the k-th tenth of them. Where
loss or gradient is not finite the step is left out.
"""

__all__ = ["BINS", "DiffusionModule", "bin_name", "is_logged"]

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.loss import Loss
from diffusion_lab.parameterization import Parameterization
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast
from diffusion_lab.timesteps import TimestepSampler, Uniform

BINS = 10  # of the training's times, for the losses per noise level
EDGES = torch.arange(1, BINS, dtype=torch.float64) / BINS
GOLDEN = 0.6180339887498949  # fractional parts of its multiples fill [0, 1) evenly


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether a step makes a row of the log: every N-th and the last."""
    return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps


def _bin(u: Tensor) -> Tensor:
    """The bin, 0 to 9, of the noise level that each u in [0, 1) stands for."""
    return torch.bucketize(u, EDGES.to(u.device), right=True)


def bin_name(k: int) -> str:
    """Returns a bin's name: the share of the training's times below its end."""
    return f"{(k + 1) / BINS:.1f}"


def check_variance(network: bool, loss: bool) -> None:
    """Holds the network's variance output against the loss.

    Arguments:
        network: Whether the network has one.
        loss: Whether the loss teaches it.

    Raises:
        ConfigError: If only one is true.
    """
    if network and not loss:
        raise ConfigError(
            "network.learn_variance=true, but the loss does not teach the variance; add "
            "loss=hybrid, or leave network.learn_variance=false"
        )
    if loss and not network:
        raise ConfigError(
            "loss=hybrid teaches the variance, but network.learn_variance=false; add "
            "network.learn_variance=true, or choose loss=simple"
        )


class DiffusionModule(LightningModule):
    """Trains a network to denoise, and holds the moving average of its weights.

    Arguments:
        network: Maps (x_t, i), i DDPM's noise index, to a prediction of x_t's shape; see
            `NetworkDenoiser` for one that learns the variance.
        schedule: The noise schedule.
        parameterization: What the network predicts.
        loss: What an error weighs.
        optimizer: Makes the optimizer from parameters.
        lr_schedule: Makes the learning-rate schedule from an optimizer and the number of steps.
        time: How t is drawn; uniform if None.
        label_dropout: How often an image's class is withheld from a network that is told it, in
            [0, 1]: so that it learns p(x_0), too.
        run_config: The run's configuration as plain containers; saved with every checkpoint.

    Attributes:
        skipped: Whether the newest step of the optimizer was left out, because loss or gradient
            was not finite; on the device if nothing waited for it there, otherwise on the CPU.

    Raises:
        ConfigError: If the network has a variance to learn and the loss teaches none, or the other
            way round.
    """

    FORMAT = 1  # of what this module adds to a checkpoint

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        loss: Loss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer, int], LRScheduler],
        time: TimestepSampler | None = None,
        label_dropout: float = 0.1,
        run_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_variance(getattr(network, "learn_variance", False), loss.learns_variance)
        self.network = network
        self.network_ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.schedule = schedule
        self.parameterization = parameterization
        self.loss, self.time = loss, time or Uniform()
        self.label_dropout = label_dropout
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.run_config = run_config or {}
        self._step_losses: list[Tensor] = []  # of one optimizer step, more than one if accumulated
        self.skipped = torch.zeros((), dtype=torch.bool)
        self._norm: Tensor | None = None  # of the newest gradient, before clipping
        self._seen: list[tuple[Tensor, Tensor]] = []  # u and losses, of images since the last row
        self._seen_before = torch.zeros(2, BINS, dtype=torch.float64)  # their sums up to a resume
        self._loss_bins: dict[str, float] = {}  # as they were logged last
        self.val_loss = MeanMetric()
        self.val_loss_ema = MeanMetric()
        self.val_loss_bin = nn.ModuleList(MeanMetric() for _ in range(BINS))
        # The schedule's tables, which never change: devices would tell each other in every step.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if not name.startswith("network.")
        ]

    def train(self, mode: bool = True) -> "DiffusionModule":
        """Sets the training mode, which the averaged network never takes."""
        super().train(mode)
        self.network_ema.eval()
        return self

    def denoiser(self, ema: bool = True, label: Tensor | None = None) -> NetworkDenoiser:
        """Returns E[x_0 | x_t] by the averaged weights, or the raw ones, of all images or of a
        class."""
        network = self.network_ema if ema else self.network
        return NetworkDenoiser(network, self.schedule, self.parameterization, label)

    def setup(self, stage: str) -> None:
        """Holds the network's classes against those of the images.

        Raises:
            ConfigError: If they differ in number.
        """
        data = getattr(self.trainer, "datamodule", None)
        mine, theirs = getattr(self.network, "classes", 0), len(getattr(data, "classes", ()))
        if data is not None and mine != theirs:
            raise ConfigError(
                f"network.classes={mine}, but the images have {theirs} classes "
                f"(data.label={getattr(data, 'label', None)}); set network.classes={theirs}"
                + ("" if theirs else ", or data.label")
            )

    def _losses(
        self, x_0: Tensor, t: Tensor, epsilon: Tensor, ema: bool, label: Tensor | None = None
    ) -> Tensor:
        """The loss of each image, of shape (B,)."""
        alpha_t, sigma_t = (broadcast(c, x_0) for c in self.schedule(t))
        x_t = alpha_t * x_0 + sigma_t * epsilon
        target = self.parameterization.target(x_0, epsilon, alpha_t, sigma_t)
        output, share = self.denoiser(ema, label).outputs(x_t, t)
        learned = () if share is None else (share, x_0)
        return self.loss(output, target, self.schedule, self.parameterization, t, *learned)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean loss of a batch, weighted for unequal numbers of images."""
        x_0, generator = batch["x_0"], KeyedGenerator(batch["key"])
        u = generator.uniform().double()
        u = batch["stratum"] if self.time.stratified else u
        t, factor = self.time(u, self.schedule)
        epsilon = generator.normal(*x_0.shape[1:])
        label = self._label(batch)
        losses = factor.to(x_0) * self._losses(x_0, t, epsilon, ema=False, label=label)
        # The devices' gradients are averaged: weighted, that is the mean over the global batch.
        loss = losses.mean() * batch["weight"]
        self._seen.append((u, losses.detach()))
        self._log_loss(loss.detach())
        # The gradient of a loss that is not finite shall not be either: the devices' gradients
        # are averaged, and so all of them leave the step out.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _label(self, batch: dict[str, Any]) -> Tensor | None:
        """The classes of a batch, some of them withheld: the label K."""
        if "label" not in batch:
            return None
        u = KeyedGenerator(make_key(batch["key"], "label")).uniform()
        return torch.where(u < self.label_dropout, self.network.classes, batch["label"])

    def _log_loss(self, loss: Tensor) -> None:
        """Logs the mean over all images of an optimizer step, if that makes a row."""
        self._step_losses.append(loss)
        trainer = self.trainer
        if trainer.fit_loop._should_accumulate():
            return
        if is_logged(trainer, trainer.global_step + 1):
            loss = torch.stack(self._step_losses).mean()
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
            self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self._step_losses.clear()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves the step out if its gradient is not finite, and logs the figures of a row.

        A fused optimizer is told so by a flag on the device, as a gradient scaler tells it, and
        nothing waits. Others leave parameters without a gradient alone; for them the flag has to
        come to the host, one wait a step.
        """
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = self._norm = nn.utils.get_total_norm(gradients)
        self.skipped = ~norm.isfinite()
        if all(group.get("fused") for group in groups):
            optimizer.found_inf = self.skipped.float()
        else:
            self.skipped = self.skipped.cpu()
            if self.skipped:
                optimizer.zero_grad(set_to_none=True)
        if is_logged(self.trainer, self.trainer.global_step + 1):
            figures = {"train/grad_norm": norm, "train/lr": groups[0]["lr"]}
            self.log_dict(figures | self._losses_per_bin(), batch_size=1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scales the gradient down to a largest norm, by the norm that is known by now."""
        own = gradient_clip_algorithm in (None, "norm")
        if not own or getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._norm)

    def _losses_per_bin(self) -> dict[str, float]:
        """The mean loss in each bin, over the images of all devices since the last row.

        A bin without any keeps its last value.
        """
        sums, counts = self._sums().tolist()
        self._seen.clear()
        self._seen_before.zero_()
        for k, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                self._loss_bins[f"train/loss_bin/{bin_name(k)}"] = total / count
        return self._loss_bins

    def _sums(self) -> Tensor:
        """The sums of the losses since the last row, and their numbers, of shape (2, BINS)."""
        table = self._seen_before.clone() * self.trainer.is_global_zero
        if self._seen:
            u, losses = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            inside = _bin(u)[:, None] == torch.arange(BINS, device=u.device)
            sums = torch.where(inside, losses[:, None].double(), 0).sum(0)
            table = table.to(u.device) + torch.stack([sums, inside.sum(0).double()])
        return self.trainer.strategy.reduce(table.to(self.device), reduce_op="sum")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds a batch to the validation losses of the raw and of the averaged weights."""
        x_0 = batch["x_0"]
        u = ((batch["index"].double() + 0.5) * GOLDEN) % 1.0
        t, factor = self.time(u, self.schedule)
        epsilon = KeyedGenerator(batch["key"]).normal(*x_0.shape[1:])
        label = batch.get("label")
        raw, losses = (
            factor.to(x_0) * self._losses(x_0, t, epsilon, ema=ema, label=label)
            for ema in (False, True)
        )
        self.val_loss.update(raw)
        self.val_loss_ema.update(losses)
        number = _bin(u)
        for k, metric in enumerate(self.val_loss_bin):
            inside = number == k
            if inside.any():
                metric.update(losses[inside])
        self.log("val/loss", self.val_loss, batch_size=len(x_0))
        self.log("val/loss_ema", self.val_loss_ema, batch_size=len(x_0), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the averaged weights' loss per noise level.

        A bin is named by the share of the training's times below its end: for uniform times that
        is its largest t.
        """
        for k, metric in enumerate(self.val_loss_bin):
            self.log(f"val/loss_bin/{bin_name(k)}", metric.compute())
            metric.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """Makes the optimizer, and the learning-rate schedule that is stepped with it."""
        optimizer = self.make_optimizer(self.network.parameters())
        lr_schedule = self.make_lr_schedule(optimizer, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": lr_schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration, so that a lone file can be rebuilt, and what is to be logged."""
        data = self._trainer and getattr(self.trainer, "datamodule", None)
        sums = self._sums() if self._trainer else self._seen_before
        checkpoint["diffusion_lab"] = {
            "format": self.FORMAT,
            "config": self.run_config,
            "classes": list(getattr(data, "classes", ())),
            "loss_bins": {"sums": sums.tolist(), "last": dict(self._loss_bins)},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the losses of images that no row has yet."""
        self._lay_out(checkpoint.get("optimizer_states", ()))
        if bins := checkpoint.get("diffusion_lab", {}).get("loss_bins"):
            self._seen_before = torch.tensor(bins["sums"], dtype=torch.float64)
            self._loss_bins = dict(bins["last"])

    def _lay_out(self, optimizer_states: Iterable[dict[str, Any]]) -> None:
        """Gives what an optimizer holds of a parameter the parameter's order in memory.

        A fused optimizer goes through both as they lie there, and says nothing if the order is
        another: that of a checkpoint whose network was not channels_last.
        """
        parameters = list(self.network.parameters())
        for optimizer in optimizer_states:
            for k, values in optimizer["state"].items():
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameters[k].shape:
                        values[name] = torch.empty_like(
                            parameters[k], dtype=value.dtype, device=value.device
                        ).copy_(value)
