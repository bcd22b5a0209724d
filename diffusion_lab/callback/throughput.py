r"""Training speed, model FLOP utilization and memory.

    perf/images_per_second   images of all devices per second of training, without validations and
                             sample grids
    perf/tflops              3 F images_per_second / 10¹², where F is the number of operations of
                             one forward pass per image (2 per multiply-add); a backward pass takes
                             twice as many
    perf/mfu                 perf/tflops over the peak of all devices
    perf/memory_gb           largest memory so far on any device, in 10⁹ bytes: allocated on a GPU,
                             resident in the process on a CPU
    train/images             number of images seen

F is counted from the shapes of the tensors; recomputation (activation checkpointing) is excluded.

Source:
    Chowdhery et al., "PaLM: scaling language modeling with pathways", 2022, section 4.1 (MFU).
"""

__all__ = ["Throughput", "count_flops", "measure_peak"]

import logging
import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.callback.trainer_state import diffusion_module
from diffusion_lab.constraints import Positive, checked
from diffusion_lab.training.module import DiffusionModule, should_log

log = logging.getLogger(__name__)

DTYPES = {
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}  # or float32


def count_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the number of operations of one forward pass, counted on the meta device.

    Arguments:
        network: Maps (x_t, i) to a prediction.
        shape: The shape of x_t, (1, C, H, W).
    """
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    tensors = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    inputs = (torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        with torch.compiler.set_stance("force_eager"):
            functional_call(network, tensors, inputs)
    return int(counter.get_total_flops())


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per second of a large matrix product, the best of five."""
    size, precision = 512, torch.get_float32_matmul_precision()
    if device.type == "cuda":
        size = 8192
        torch.set_float32_matmul_precision("high")  # the precision of convolutions
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):  # one to warm up
        start = _now(device)
        a @ a
        seconds.append(_now(device) - start)
    torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / min(seconds[1:])


def _now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> float:
    """The largest memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size  # kilobytes except on macOS


class Throughput(Callback):
    """Logs the metrics above in every row of the log, over the steps since the previous row.

    Arguments:
        peak_tflops: Peak of one device, in 10¹² operations per second; None measures it by a
            matrix product.
    """

    @checked
    def __init__(self, peak_tflops: Positive | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.flops: int | None = None  # F
        self.images = 0  # of the whole run
        self.counted = 0  # images up to the previous row
        self.step = 0
        self.start: float | None = None  # start of the timer; None while it is stopped
        self.seconds = 0.0  # since the previous row, before the timer was started

    def state_dict(self) -> dict[str, int]:
        """Returns the number of images seen, for a resumed run."""
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.images = state["images"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step, self.counted = trainer.global_step, self.images
        self.start, self.seconds = None, 0.0

    def _prepare(self, trainer: Trainer, module: DiffusionModule, shape: tuple[int, ...]) -> None:
        """Counts F for images of a shape (C, H, W) and measures the peak."""
        if self.peak_tflops is None:
            dtype = DTYPES.get(str(trainer.precision), torch.float32)
            self.peak_tflops = measure_peak(module.device, dtype) / 1e12
            if module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(module.device)
        try:
            self.flops = count_flops(module.network, (1, *shape))
        except (NotImplementedError, RuntimeError) as error:  # for custom networks
            log.warning(
                "the operations of the network cannot be counted (%s): perf/mfu is 0", error
            )
            self.flops = 0
        log.info(
            "a training step takes %.4g TFLOP per image; the peak of one device is %.4g TFLOP/s",
            3 * self.flops / 1e12, self.peak_tflops,
        )  # fmt: skip

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module = diffusion_module(module)
        if self.flops is None:
            self._prepare(trainer, module, batch["x_0"].shape[1:])
        if self.start is None:
            self.start = _now(module.device)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.start is not None:
            self.seconds += _now(module.device) - self.start
            self.start = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Over all devices: the weight is the share of this device in the global batch.
        self.images += round(len(batch["x_0"]) * trainer.world_size / batch["weight"])
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if not should_log(trainer, self.step):
            return
        if self.start is None or self.flops is None or self.peak_tflops is None:
            return  # set in on_train_batch_start
        now = _now(module.device)
        rate = (self.images - self.counted) / (self.seconds + now - self.start)
        self.start, self.seconds, self.counted = now, 0.0, self.images
        tflops = 3 * self.flops * rate / 1e12
        memory = torch.tensor(_memory(module.device) / 1e9, device=module.device)
        metrics = {
            "train/images": torch.tensor(self.images, dtype=torch.float64),
            "perf/images_per_second": rate,
            "perf/tflops": tflops,
            "perf/mfu": tflops / (self.peak_tflops * trainer.world_size),
            "perf/memory_gb": trainer.strategy.reduce(memory, reduce_op="max"),
        }
        module.log_dict(metrics, batch_size=1)
