"""Loading the prior of a run, of a checkpoint, or of a U-Net in diffusers' format."""

__all__ = ["PRETRAINED", "Run", "conditioned", "load_run", "pretrained", "rebuild", "start_from"]

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from torch import nn

from diffusion_lab.denoiser import ClassifierFree, Denoiser, NetworkDenoiser
from diffusion_lab.deprecated import current_config
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.interop import diffusers as interop
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.runs.checkpoint import load_checkpoint
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.post_hoc_ema import reconstruct

PRETRAINED = "weights from elsewhere, which very likely saw the test images"
FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A run, rebuilt.

    Attributes:
        checkpoint: The file that it comes from.
        config: The run's resolved configuration.
        origin: What the weights are, for reports.
        denoiser: E[x_0 | x_t], in evaluation mode.
        classes: The names of the classes that it knows.
    """

    checkpoint: Path
    config: dict[str, Any]
    origin: str
    denoiser: Denoiser
    classes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        size = self.config["data"]["size"]
        return self.config["network"].get("image_channels", 3), size, size


def _build(config: dict[str, Any], key: str, path: Path) -> nn.Module:
    """Makes a part of the model that a checkpoint's configuration describes.

    Only classes of modules: a checkpoint that came by mail must not get to call anything else.
    """
    node = config[key]
    try:
        target = hydra.utils.get_class(node["_target_"])
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: {key}._target_ cannot be found ({error})") from error
    if not issubclass(target, nn.Module):
        raise RunError(f"{path}: {key}._target_={node['_target_']} is not a torch module")
    return instantiate(node, key)


def rebuild(path: str | Path, ema: bool | float = True) -> Run:
    """Rebuilds a run from its directory or from a lone checkpoint file.

    Arguments:
        path: The run's directory (then `checkpoints/last.ckpt` is taken) or a checkpoint.
        ema: Whether to take the averaged weights, or the raw ones; or the relative width σ_rel of
            an average that is made of the run's snapshots at the checkpoint's step.

    Raises:
        RunError: If there is no such run or its checkpoint cannot be used.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RunError(f"{path} does not exist; give a run's directory or a checkpoint file")
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.exists():
        raise RunError(f"{path} holds no checkpoints/last.ckpt; is it a run's directory?")
    checkpoint = load_checkpoint(file)
    saved = checkpoint.get("diffusion_lab") if isinstance(checkpoint, dict) else None
    if not saved or not saved.get("config"):
        raise RunError(f"{file} is a checkpoint, but not one written by diffusion_lab")
    if saved["format"] > FORMAT:
        raise RunError(
            f"{file} has format {saved['format']}, newer than {FORMAT}; update diffusion_lab"
        )
    config = current_config(saved["config"])
    network = _build(config, "network", file)
    prefix = "network." if ema is False else "network_ema."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    kind = "averaged" if ema else "raw"
    if not isinstance(ema, bool):
        kind = f"averaged to width {ema:g},"
        snapshots = file.parent.parent / "ema"
        average = reconstruct(snapshots, ema, checkpoint["global_step"])
        if average.keys() != {name for name, _ in network.named_parameters()}:
            raise RunError(f"{snapshots} holds averages of other parameters than {file}")
        weights |= average  # the buffers are those of the checkpoint
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{file}: the weights do not fit the network: {error}") from error
    denoiser = NetworkDenoiser(
        network, _build(config, "schedule", file), _build(config, "parameterization", file)
    )
    denoiser.eval().requires_grad_(False)
    origin = f"{checkpoint['global_step']:,} steps, {kind} weights"
    return Run(file, config, origin, denoiser, tuple(saved.get("classes", ())))


def pretrained(path: str | None, data: dict[str, Any]) -> Run:
    """Makes a prior of a U-Net in diffusers' format.

    Arguments:
        path: The folder, or the name of one on the hub.
        data: The configuration of the images that it was trained on.

    Raises:
        ConfigError: If no path is given.
        RunError: If the folder cannot be used.
    """
    if path is None:
        raise ConfigError(
            "model=pretrained needs model.path=<folder>, with config.json and the weights in "
            "diffusers' format, or a name on the hub"
        )
    network = interop.load_unet(path)
    denoiser = NetworkDenoiser(network, interop.load_schedule(path), Epsilon())
    denoiser.eval().requires_grad_(False)
    config = {"data": data, "network": {"image_channels": network.image_channels}}
    return Run(Path(path), config, PRETRAINED, denoiser)


def conditioned(run: Run, label: str | int, strength: float) -> Run:
    """Makes the prior of a run one of a class, by classifier-free guidance.

    Arguments:
        run: The run, of a network that knows classes.
        label: The class, by name or number.
        strength: The strength w of the guidance; 1 is p(x_0 | class) itself.

    Raises:
        ConfigError: If the network knows no classes, or not this one; names them.
    """
    prior, names = run.denoiser, run.classes
    if not names:
        raise ConfigError(
            f"label={label}: the network of {run.checkpoint} knows no classes; train one with "
            "data.label and network.classes (experiment=ddpm_faces_classes)"
        )
    number = names.index(str(label)) if str(label) in names else label
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(names):
        raise ConfigError(
            f"label={label} is none of the {len(names)} classes of {run.checkpoint}: "
            + ", ".join(names)
        )
    conditional = NetworkDenoiser(prior.network, prior.schedule, prior.parameterization, number)
    guided = ClassifierFree(conditional, prior, strength)
    origin = f"{run.origin}; class {names[number]}, guidance {strength}"
    return replace(run, denoiser=guided.eval(), origin=origin)


def start_from(module: DiffusionModule, path: str) -> None:
    """Gives a module that is to be trained the weights of a U-Net in diffusers' format.

    Raises:
        RunError: If the folder cannot be used, or its network is another; names the first tensor
            that differs.
    """
    state = interop.load_unet(path).state_dict()
    for name, tensor in module.network.state_dict().items():
        theirs = state.get(name)
        if theirs is None or theirs.shape != tensor.shape:
            raise RunError(
                f"pretrained={path} does not fit network: {name} is {tuple(tensor.shape)} here, "
                f"{'missing' if theirs is None else tuple(theirs.shape)} there; choose the "
                "network= of the folder's config.json"
            )
    if more := sorted(state.keys() - module.network.state_dict().keys()):
        raise RunError(f"pretrained={path} does not fit network: {more[0]} is only there")
    module.network.load_state_dict(state)
    module.network_ema.load_state_dict(state)


def load_run(path: str | Path, ema: bool | float = True) -> NetworkDenoiser:
    """Returns the denoiser of a run, by its averaged weights and in evaluation mode.

    Arguments:
        path: The run's directory or a checkpoint file.
        ema: As in `rebuild`: true, false, or a relative width.

    Raises:
        RunError: If there is no such run or its checkpoint cannot be used.
    """
    return rebuild(path, ema).denoiser
