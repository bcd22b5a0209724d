"""Training steps synchronize with the device only if they write a row of the log.

The device is a GPU of PyTorch's fake tensors, which have a shape and a device but no values. Each
read of a value (`float`, `bool`, `.cpu()`) and each copy to the device is counted. Operations on
tensors of different devices are errors, as on a GPU.
"""

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_lab.callback import EMA, LastCheckpoint, NaNGuard, PowerEMA, Throughput
from diffusion_lab.data import ImageDataModule
from diffusion_lab.loss import MinSNR, Simple
from diffusion_lab.nn import UNet
from diffusion_lab.parameterization import Epsilon, V
from diffusion_lab.schedule import VP
from diffusion_lab.schedule import Cosine as CosineSchedule
from diffusion_lab.timesteps import Uniform
from diffusion_lab.training.lr_schedule import Cosine
from diffusion_lab.training.module import DiffusionModule

aten = torch.ops.aten
GPU = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Counts reads of values, and copies between the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        tensors = [x for x in args if isinstance(x, Tensor)]
        if function in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.counts["read"] += tensors[0].device.type == "cuda"
        if function is aten._to_copy.default:
            here = tensors[0].device.type
            there = torch.device(kwargs.get("device") or here).type
            waits = here != there and not (there == "cuda" and kwargs.get("non_blocking"))
            self.counts[f"{here} to {there}"] += waits
        return function(*args, **kwargs)


class Fit:
    """A fake trainer that calls module and callbacks in the order of Lightning.

    Arguments:
        module: The module, on the device.
        callbacks: The callbacks.
        every: Steps between two rows of the log.
    """

    def __init__(self, module: DiffusionModule, callbacks: list[Any], every: int) -> None:
        self.module, self.callbacks = module, callbacks
        self.log_every_n_steps, self.max_steps, self.global_step = every, 1000, 0
        self.world_size, self.is_global_zero, self.precision = 1, True, "32-true"
        self.fast_dev_run, self.datamodule = True, None
        self.strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
        self.precision_plugin = SimpleNamespace()
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace())
        module._trainer = self
        module.log = module.log_dict = lambda *args, **_: None
        self.optimizer = torch.optim.Adam(module.network.parameters(), lr=1e-3, fused=True)
        self.rates = Cosine(self.optimizer, 1000)
        for callback in callbacks:
            callback.log = callback.log_dict = lambda *args, **_: None
            callback.on_train_start(self, module)

    def step(self, batch: dict[str, Any]) -> None:
        data = ImageDataModule("faces", 8, 4, {"train": 8, "val": 4, "test": 4})
        batch = data.on_after_batch_transfer(batch, 0)
        for callback in self.callbacks:
            callback.on_train_batch_start(self, self.module, batch, 0)
        loss = self.module.training_step(batch, 0)
        assert loss.device == GPU and loss.requires_grad
        # In place of `loss.backward()`, which needs a real device.
        for parameter in self.module.network.parameters():
            parameter.grad = torch.empty_like(parameter)
        self.module.on_before_optimizer_step(self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer, 1.0, "norm")
        self.optimizer.step()
        self.rates.step()
        self.global_step += 1
        for callback in self.callbacks:
            callback.on_train_batch_end(self, self.module, None, batch, 0)


def make_batch(labelled: bool) -> dict[str, Any]:
    """A batch of four images on the device."""
    numbers = torch.arange(4, device=GPU)
    return {
        "image": torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device=GPU),
        "index": numbers,
        "key": numbers.clone(),
        "stratum": torch.zeros(4, dtype=torch.float64, device=GPU),
        "split": "train",
        "weight": 1.0,
        **({"label": numbers % 2} if labelled else {}),
    }


def move(module: DiffusionModule) -> None:
    """Moves the module to the device; `to` fails, since the weights have values."""
    for part in module.modules():
        for name, value in part._parameters.items():
            there = torch.empty_like(value, device=GPU)
            part._parameters[name] = torch.nn.Parameter(there, value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty_like(value, device=GPU)


@pytest.mark.parametrize(
    ("schedule", "parts", "network"),
    [
        (CosineSchedule, {"parameterization": Epsilon(), "loss": Simple()}, {}),
        (
            VP,
            {"parameterization": V(), "loss": MinSNR(), "time": Uniform(stratified=True)},
            {"classes": 2},
        ),
    ],
)
def test_step_without_a_log_row_does_not_synchronize(
    tmp_path: Path, schedule: Any, parts: dict, network: dict
) -> None:
    module = DiffusionModule(
        UNet(8, (1, 2), 1, (1,), groups=4, **network), schedule(), optimizer=None,
        lr_schedule=None, **parts,
    )  # fmt: skip
    # In a separate process, because fake tensors make torch assume a GPU afterwards.
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        counts, control = process.submit(_count_synchronizations, module, tmp_path).result()
    assert counts == {}
    assert control == {"cuda to cpu": 1}


def _count_synchronizations(module: DiffusionModule, folder: Path) -> tuple[dict, dict]:
    """Counts synchronizations in a training step, and in a read that is known to synchronize."""
    for name in ("synchronize", "max_memory_allocated", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda device: 0)
    labelled = module.network.classes > 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(module)
        callbacks = [
            EMA(0.99), PowerEMA(str(folder), [0.1]), Throughput(peak_tflops=1.0), NaNGuard(),
            LastCheckpoint(str(folder), 100),
        ]  # fmt: skip
        fit = Fit(module, callbacks, every=50)
        batch = make_batch(labelled)
        fit.step(dict(batch))  # the first step does one-time work
        with Watch() as watch:
            fit.step(dict(batch))
        assert module.skipped.device == GPU and fit.global_step == 2
        with Watch() as control:
            module.skipped.cpu()
    return dict(+watch.counts), dict(+control.counts)
