r"""How fast a training is, and how much of what the device could do.

    perf/images_per_second   images of all devices over the time of training alone: validations and
                             the pictures after them are not counted
    perf/tflops              3 F images_per_second / 10¹², F the operations of one forward pass
                             for an image (2 for each multiplication with its addition): a backward
                             pass takes twice as many
    perf/mfu                 its share of the devices' peak
    perf/memory_gb           largest memory so far on any device, in 10⁹ bytes: allocated on a GPU,
                             resident in the process on a CPU
    train/images             images seen

F is counted, not estimated; recomputation (checkpointing) would not count.

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
from lightning import Callback, Trainer
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.training.module import DiffusionModule, is_logged

log = logging.getLogger(__name__)

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of the products; or float32


def count_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the operations of one forward pass, by its tensors' shapes: nothing is computed.

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
    return counter.get_total_flops()


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations a second of a product of large square matrices, the best of five."""
    size, precision = 512, torch.get_float32_matmul_precision()
    if device.type == "cuda":
        size = 8192
        torch.set_float32_matmul_precision("high")  # as convolutions are computed there
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):  # one to warm up
        start = _now(device)
        a @ a
        seconds.append(_now(device) - start)
    torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / min(seconds[1:])


def _now(device: torch.device) -> float:
    """The time in seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> float:
    """The largest memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size  # kilobytes, but on macOS


class Throughput(Callback):
    """Logs the figures above in every row of the log, over the steps since the row before.

    Arguments:
        peak_tflops: The peak of one device, in 10¹² operations a second; None measures that of a
            matrix product, once.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.flops: int | None = None  # F
        self.images = 0  # of the whole run
        self.counted = 0  # of them, those of the rows before
        self.step = 0
        self.start: float | None = None  # of the clock; None while it stands
        self.seconds = 0.0  # since the row before, up to the clock's start

    def state_dict(self) -> dict[str, int]:
        """Returns the images seen, with which a resumed run goes on."""
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.images = state["images"]

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
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
        except (NotImplementedError, RuntimeError) as error:  # of a network of the user's own
            log.warning("the network's operations cannot be counted (%s): perf/mfu is 0", error)
            self.flops = 0
        log.info(
            "a training step takes %.4g TFLOP an image; one device does %.4g TFLOP/s",
            3 * self.flops / 1e12, self.peak_tflops,
        )  # fmt: skip

    def on_train_batch_start(
        self, trainer: Trainer, module: DiffusionModule, batch: Any, batch_idx: int
    ) -> None:
        if self.flops is None:
            self._prepare(trainer, module, batch["x_0"].shape[1:])
        if self.start is None:
            self.start = _now(module.device)

    def on_validation_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        if self.start is not None:
            self.seconds += _now(module.device) - self.start
            self.start = None

    def on_train_batch_end(
        self, trainer: Trainer, module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Of all devices: this one's share of a batch is in its weight.
        self.images += round(len(batch["x_0"]) * trainer.world_size / batch["weight"])
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if not is_logged(trainer, self.step):
            return
        now = _now(module.device)
        rate = (self.images - self.counted) / (self.seconds + now - self.start)
        self.start, self.seconds, self.counted = now, 0.0, self.images
        tflops = 3 * self.flops * rate / 1e12
        memory = torch.tensor(_memory(module.device) / 1e9, device=module.device)
        figures = {
            "train/images": torch.tensor(self.images, dtype=torch.float64),
            "perf/images_per_second": rate,
            "perf/tflops": tflops,
            "perf/mfu": tflops / (self.peak_tflops * trainer.world_size),
            "perf/memory_gb": trainer.strategy.reduce(memory, reduce_op="max"),
        }
        self.log_dict(figures, batch_size=1)
