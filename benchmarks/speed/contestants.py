"""Workloads of the speed benchmark: ours and the peers', on the same weights and inputs.

Each function makes the `Workload` of one side, in the process of that side. The sides:

    ours, ours compiled                           our U-Net, and with compiled blocks
    diffusers contiguous, diffusers channels_last UNet2DModel in both memory layouts
    diffusers compiled                            torch.compile of it, channels_last
    denoising-diffusion-pytorch                   another network of the same widths
"""

__all__ = [
    "SETTINGS", "Setting", "features", "framework", "guided", "has_denoising_diffusion_pytorch",
    "load", "loader", "make_network", "make_photos", "peak", "predict", "sample", "train",
]  # fmt: skip

import copy
import ctypes
import gc
import importlib.util
import io
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.machine import ROOT
from benchmarks.speed.alternate import Workload, now
from diffusion_lab.callback.throughput import count_flops
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.faces import draw_faces
from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.guidance.jacobian import tweedie_moments
from diffusion_lab.interop.diffusers import load_unet
from diffusion_lab.metric import EfficientNetLite0
from diffusion_lab.metric.features import extract
from diffusion_lab.nn import UNet
from diffusion_lab.nn.cuda_graph import capture
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.pixels import to_model
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.sampler import Ancestral
from diffusion_lab.schedule import Linear

STEPS = 10  # sampler steps
JPEG_SIZE, JPEG_BATCH = 256, 32
JPEGS, COPIES = 256, 4  # a file is drawn once and stored four times
FACES = 4096  # training images
TIMER = "benchmarks.speed.alternate.AlternatingTimer"
TIMED = 5  # measurements of the peak; the best one is taken


@dataclass(frozen=True)
class Setting:
    """A network, its images and batches.

    Attributes:
        network: The arguments of our U-Net.
        size: Height and width of the images.
        batch: Images of a batch, by the type of device.
    """

    network: dict[str, Any]
    size: int
    batch: dict[str, int]


def _setting(name: str, size: int, cpu: int, cuda: int) -> Setting:
    base, own = (
        yaml.safe_load((ROOT / "conf" / "network" / f"{file}.yaml").read_text())
        for file in ("unet_256", name)  # the others state how they differ from unet_256
    )
    network = {k: v for k, v in (base | own).items() if k not in ("_target_", "defaults")}
    return Setting(network, size, {"cpu": cpu, "cuda": cuda})


MIDDLE = {
    "channels": 64, "multipliers": [1, 2, 2, 4], "blocks": 2, "attention_levels": [2],
    "groups": 32,
}  # fmt: skip
SETTINGS = {
    "tiny": _setting("unet_tiny", 16, 2, 2),
    "faces": _setting("unet_faces", 32, 16, 512),
    "64": Setting(MIDDLE, 64, {"cpu": 8, "cuda": 128}),
    "256": _setting("unet_256", 256, 1, 64),
}


def make_network(setting: Setting) -> UNet:
    """Makes the network of a setting with random weights in all layers.

    The last layers of a new network are close to zero and would hide differences.
    """
    torch.manual_seed(0)
    network = UNet(**setting.network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return network


def has_denoising_diffusion_pytorch() -> bool:
    """Whether the package, which is not a dependency, is installed."""
    return importlib.util.find_spec("denoising_diffusion_pytorch") is not None


def load(
    side: str, setting: Setting, folder: Path, device: str, graphs: bool = False
) -> nn.Module:
    """Makes the network of a side, with the weights in a folder.

    Arguments:
        side: The side.
        setting: The setting of the weights.
        folder: Written by `save_unet`.
        device: "cpu" or "cuda".
        graphs: Whether compiled sides use CUDA graphs on a GPU, for sampling.
    """
    network: nn.Module
    if side.startswith("ours"):
        network = load_unet(folder).to(device)
        if side == "ours compiled":
            network.compile_blocks()
            if graphs:
                capture(network)
        return network
    if side == "denoising-diffusion-pytorch":
        from denoising_diffusion_pytorch import Unet

        torch.manual_seed(0)
        widths = tuple(setting.network["multipliers"])
        return Unet(setting.network["channels"], dim_mults=widths).to(device)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    network = diffusers.UNet2DModel.from_pretrained(folder).to(device)
    network.register_to_config(sample_size=setting.size)  # needed by pipelines
    if side != "diffusers contiguous":
        network.to(memory_format=torch.channels_last)
    if side == "diffusers compiled":
        network = torch.compile(network, mode="reduce-overhead" if graphs else None)
    return network


def predict(network: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    """Returns the prediction of a side's network."""
    output = network(x, index)
    return output if isinstance(output, Tensor) else output.sample


def _facts(side: str, network: nn.Module, setting: Setting) -> dict[str, Any]:
    """Counts the FLOPs per image of a forward pass of the published network."""
    if side not in ("diffusers contiguous", "denoising-diffusion-pytorch"):
        return {}
    shape = (1, 3, setting.size, setting.size)
    parameters = sum(p.numel() for p in network.parameters())
    return {"flops": count_flops(network, shape), "parameters": parameters}


def _inputs(side: str, setting: Setting, batch: int, device: str) -> tuple[Tensor, ...]:
    """Returns x, a target and indices, in the memory layout of the side's network."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, setting.size, setting.size)
    plain = side in ("diffusers contiguous", "denoising-diffusion-pytorch")
    layout = torch.contiguous_format if plain else torch.channels_last
    x, target = (
        torch.randn(shape, generator=generator).to(device, memory_format=layout) for _ in range(2)
    )
    index = torch.randint(0, 1000, (batch,), generator=generator).to(device)
    return x, target, index


def train(
    side: str, setting: Setting, folder: Path, dtype: str, batch: int, device: str
) -> Workload:
    """A step of training: forward, backward and a fused Adam step.

    The facts include the peak memory of three steps, above that of the process before.
    """
    network = load(side, setting, folder, device).train()
    facts = _facts(side, network, setting)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    x, target, index = _inputs(side, setting, batch, device)

    def step(images: int = batch) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            output = predict(network, x[:images], index[:images])
        F.mse_loss(output.float(), target[:images]).backward()
        optimizer.step()

    compiled = "compiled" in side
    step(batch if compiled else 1)  # creates optimizer states and compiled code
    if device == "cuda" or not compiled:
        facts["memory"] = [_memory_of(step, device) for _ in range(3)]
    return Workload(step, facts)


def _status(key: str) -> int:
    """Returns an entry of /proc/self/status in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def _memory_of(step: Callable[[], Any], device: str) -> int:
    """Returns the peak memory of a step above that before it, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/status").exists():  # then only the first step is informative
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 1)
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would otherwise be reused unnoticed
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not permitted: use the peak so far, which preparation hardly raises
        before = max(before, _status("VmHWM"))
    step()
    return max(_status("VmHWM") - before, 1)


def sample(
    side: str, setting: Setting, folder: Path, dtype: str, batch: int, device: str
) -> Workload:
    """Ten steps of DDPM's sampler, from noise to images on the CPU."""
    network = load(side, setting, folder, device, graphs=True).eval().requires_grad_(False)
    facts, shape = _facts(side, network, setting), (batch, 3, setting.size, setting.size)
    if side.startswith("ours"):
        assert isinstance(network, UNet)
        if dtype == "bf16":
            network.cast_blocks(torch.bfloat16)
        denoiser = NetworkDenoiser(network, Linear(), Epsilon()).eval()
        sampler = Ancestral(STEPS, clip=True)

        def ours() -> Tensor:
            x_0 = sampler(denoiser, torch.randn(shape, device=device))
            return (x_0 / 2 + 0.5).clamp(0, 1).cpu()

        return Workload(ours, facts)
    import diffusers

    if dtype == "bf16":
        network.to(torch.bfloat16)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=True)
    pipeline = diffusers.DDPMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    kind = "pt" if dtype == "bf16" else "np"  # numpy has no bfloat16

    def theirs() -> Any:
        images = pipeline(batch, num_inference_steps=STEPS, output_type=kind).images
        return images.cpu() if kind == "pt" else images

    return Workload(theirs, facts)


def guided(side: str, setting: Setting, folder: Path, batch: int, device: str) -> Workload:
    """E[x_0 | x_t] and Cov[x_0 | x_t] v, as in methods that use the network's derivative."""
    network = load(side, setting, folder, device).eval().requires_grad_(False)
    x_t, v, _ = _inputs(side, setting, batch, device)
    schedule = Linear()
    t = torch.tensor(0.5, dtype=torch.float64)
    if side.startswith("ours"):
        denoiser = NetworkDenoiser(network, schedule, Epsilon()).eval()

        def ours() -> tuple[Tensor, Tensor]:
            denoised, covariance = tweedie_moments(denoiser, x_t, t)
            return denoised, covariance(v)

        return Workload(ours)
    alpha_t, sigma_t = (float(c) for c in schedule(t))
    index = torch.full((batch,), float(schedule.index(t)), device=device)

    def theirs() -> tuple[Tensor, Tensor]:
        x = x_t.detach().requires_grad_()
        denoised = (x - sigma_t * predict(network, x, index)) / alpha_t
        product = torch.autograd.grad(denoised, x, v)[0]
        return denoised.detach(), sigma_t**2 / alpha_t * product

    return Workload(theirs)


def features(side: str, batch: int, device: str) -> Workload:
    """EfficientNet-Lite0 features of images: by `extract`, or by the network directly."""
    network = EfficientNetLite0().to(device)
    images = draw_faces(torch.arange(batch)).to(device)
    if side == "ours":
        return Workload(lambda: extract(network, images))

    @torch.no_grad()
    def plain() -> Tensor:
        return network(images).cpu()

    return Workload(plain)


def make_photos(folder: Path, count: int = JPEGS) -> int:
    """Writes photograph-like JPEG files into a folder with one class; returns their number."""
    from benchmarks.data import draw  # needs more packages

    (folder / "0").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(count):
        buffer = io.BytesIO()
        draw(rng).save(buffer, "JPEG", quality=95)
        for copied in range(COPIES):
            (folder / "0" / f"{k:05}-{copied}.jpg").write_bytes(buffer.getvalue())
    return COPIES * count


def _silence() -> None:
    """Redirects stdout and stderr, including progress bars, to /dev/null."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)


def loader(side: str, folder: Path, cache: Path, workers: int, device: str) -> Workload:
    """An epoch over JPEG files: decoded, mirrored at random, on the device in [-1, 1].

    Ours decodes packed files in threads and transfers uint8; the peer is
    torchvision's ImageFolder with the usual transforms in a torch DataLoader of as many processes.
    """
    if side == "ours":
        _silence()
        splits = {"train": 1.0, "val": 0.0, "test": 0.0}
        data = ImageDataModule(
            str(folder), JPEG_SIZE, JPEG_BATCH, splits, cache="bytes", cache_dir=str(cache),
            num_workers=workers,
        )  # fmt: skip
        data.open()
        batches = data.train_dataloader()
        batches.pin = device == "cuda"

        def ours() -> None:
            for batch in batches:
                moved = {
                    key: value.to(device, non_blocking=True)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in batch.items()
                }
                data.on_after_batch_transfer(moved, 0)

        return Workload(ours)
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    usual = transforms.Compose(
        [
            transforms.Resize(JPEG_SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    peer = DataLoader(
        datasets.ImageFolder(str(folder), usual), JPEG_BATCH, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0, pin_memory=device == "cuda",
    )  # fmt: skip

    def theirs() -> None:
        for images, _ in peer:
            images.to(device, non_blocking=True)

    return Workload(theirs)


def _train_config(folder: Path, overrides: list[str]) -> DictConfig:
    """Returns the configuration of `python train.py` with a directory of its own."""
    splits = f"data.splits={{train: {FACES}, val: 64, test: 64}}"
    own = [f"paths.output_dir={folder}", f"paths.cache_dir={folder / 'cache'}", splits]
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose("train", overrides=[*own, *overrides])


def framework(side: str, folder: Path, overrides: list[str], device: str) -> Workload | None:
    """A training step of the default experiment: `python train.py`, or a bare loop."""
    from diffusion_lab.command.fit import fit
    from diffusion_lab.command.process import set_up_process

    if side == "ours":
        _silence()
        set_up_process()
        fit(_train_config(folder, [*overrides, f"+callbacks.timer._target_={TIMER}"]))
        return None
    config = _train_config(folder, overrides)
    torch.manual_seed(0)
    network = instantiate(config.network, "network").to(device).train()
    averages = list(copy.deepcopy(network).requires_grad_(False).parameters())
    parameters = list(network.parameters())
    optimizer = instantiate(config.optimizer, "optimizer", params=parameters)
    schedule = instantiate(config.schedule, "schedule")
    steps = schedule.steps
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    alphas, sigmas = (c.float().to(device)[:, None, None, None] for c in schedule(times))
    size, batch = config.data.size, config.data.batch_size
    images = draw_faces(torch.arange(FACES), size=size)

    def bare() -> None:
        drawn = images[torch.randint(0, FACES, (batch,))].to(device, non_blocking=True)
        mirrored = torch.rand(batch, device=device) < 0.5
        x_0 = to_model(drawn.where(~mirrored[:, None, None, None], drawn.flip(2)))
        index = torch.randint(0, steps, (batch,), device=device)
        epsilon = torch.randn_like(x_0)
        x_t = alphas[index] * x_0 + sigmas[index] * epsilon
        optimizer.zero_grad()
        F.mse_loss(network(x_t, index), epsilon).backward()
        nn.utils.clip_grad_norm_(parameters, config.trainer.gradient_clip_val)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - config.ema.decay)

    return Workload(bare)


def peak(dtype: str, device: str) -> Workload:
    """The least seconds per floating-point operation, in a matrix product and a convolution."""
    kind = {"float32": torch.float32, "bf16": torch.bfloat16}[dtype]
    size, shape = (8192, (64, 256, 64)) if device == "cuda" else (1024, (16, 128, 32))
    batch, channels, length = shape
    a = torch.ones(size, size, device=device, dtype=kind)
    x = torch.ones(batch, channels, length, length, device=device, dtype=kind)
    w = torch.ones(channels, channels, 3, 3, device=device, dtype=kind)
    x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
    facts = {}
    for name, function, flops in (
        ("matmul", lambda: a @ a, 2 * size**3),
        ("conv", lambda: F.conv2d(x, w, padding=1), 18 * channels**2 * batch * length**2),
    ):
        function()
        seconds = []
        for _ in range(TIMED):
            start = now(device)
            function()
            seconds.append(now(device) - start)
        facts[name] = [each / flops for each in sorted(seconds)[:1]]
    return Workload(lambda: None, facts)
