"""Loading the prior of a run, of a checkpoint, or of a U-Net in diffusers' format."""

__all__ = [
    "PRETRAINED",
    "Run",
    "load_pretrained",
    "load_pretrained_weights",
    "load_run",
    "rebuild",
    "with_class_label",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import hydra
from torch import nn

from diffusion_lab.denoiser import ClassifierFree, Denoiser, NetworkDenoiser
from diffusion_lab.deprecated import current_config, current_target
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.interop import diffusers as interop
from diffusion_lab.parameterization import X0, Epsilon, V
from diffusion_lab.runs.checkpoint import load_checkpoint, non_finite_tensor
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.signature import is_signed
from diffusion_lab.runs.trust import allowed_modules, check_nodes
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.post_hoc_ema import reconstruct

PRETRAINED = "pretrained weights, which were very likely trained on the test images"
FORMAT = 1
REBUILT = ("network", "schedule", "parameterization", "data")
# The parameterizations that diffusers has; without a name in the folder it is the first.
PREDICTIONS = {"epsilon": Epsilon, "v_prediction": V, "sample": X0}
OPTIONS = {Epsilon: "epsilon", V: "v", X0: "x0"}  # of parameterization=


@dataclass(frozen=True)
class Run:
    """The prior of a run.

    Attributes:
        checkpoint: The checkpoint file.
        config: The resolved configuration of the run.
        origin: Description of the weights for reports.
        denoiser: E[x_0 | x_t], in evaluation mode.
        classes: Names of the classes that the network is conditioned on; empty if there are none.
        signed: Whether this user has written the configuration.
        splits: Hashes of the splits of the training, see `ImageDataModule.state_dict`; empty if
            they are unknown.
    """

    checkpoint: Path
    config: dict[str, Any]
    origin: str
    denoiser: Denoiser
    classes: tuple[str, ...] = ()
    signed: bool = True
    splits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        size = self.config["data"]["size"]
        return self.config["network"].get("image_channels", 3), size, size

    @property
    def network(self) -> nn.Module:
        """The network; only before the denoiser is conditioned or its schedule is replaced."""
        return cast(NetworkDenoiser, self.denoiser).network


def _build(config: dict[str, Any], key: str, path: Path) -> Any:
    """Builds a part of the model, a torch.nn.Module, from a checkpoint's checked configuration."""
    node = config[key]
    try:
        target = hydra.utils.get_class(current_target(node["_target_"]))
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: {key}._target_ cannot be found ({error})") from error
    if not issubclass(target, nn.Module):
        raise RunError(f"{path}: {key}._target_={node['_target_']} is not a torch module")
    return instantiate(node, key)


def rebuild(
    path: str | Path, ema: bool | float = True, allow: str | Sequence[str] | None = None
) -> Run:
    """Loads the prior of a run from its directory or from a checkpoint file.

    Arguments:
        path: The run's directory, for `checkpoints/last.ckpt` in it, or a checkpoint file.
        ema: True for the averaged weights, False for the raw weights, or the relative width σ_rel
            of an average that is reconstructed from the run's snapshots at the checkpoint's step.
        allow: Modules whose classes a checkpoint of somebody else may name, see `trust`.

    Raises:
        RunError: If the run does not exist, its checkpoint cannot be used, or it is not of this
            user and names a class that is not allowed.
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
    signed = is_signed(saved["config"], saved.get("signature"))
    modules = allowed_modules(allow)
    for key in REBUILT:
        check_nodes(saved["config"].get(key), key, str(file), modules, signed=signed)
    if (name := non_finite_tensor(checkpoint)) is not None:
        raise RunError(
            f"{file} cannot be used: {name} is not finite, so that the training had diverged; use "
            "an earlier checkpoint, or train again with a lower optimizer.lr"
        )
    config = current_config(saved["config"])
    network: nn.Module = _build(config, "network", file)
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
    splits = checkpoint.get("ImageDataModule", {}).get("splits", {})
    classes = tuple(saved.get("classes", ()))
    return Run(file, config, origin, denoiser, classes, signed, splits)


def load_pretrained(path: str | None, data: dict[str, Any]) -> Run:
    """Loads a prior from a U-Net in diffusers' format.

    Arguments:
        path: A folder, or the name of a model on the Hugging Face hub.
        data: The configuration of the data that it was trained on.

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


def with_class_label(run: Run, label: str | int, scale: float) -> Run:
    """Conditions the prior of a run on a class, by classifier-free guidance.

    Arguments:
        run: The run of a class-conditional network.
        label: The class, by name or number.
        scale: The guidance scale w; 1 samples p(x_0 | class).

    Raises:
        ConfigError: If the network has no classes, or not this one.
    """
    prior, names = cast(NetworkDenoiser, run.denoiser), run.classes
    if not names:
        raise ConfigError(
            f"label={label}: the network of {run.checkpoint} has no classes; train a "
            "class-conditional network with data.label and network.classes "
            "(experiment=ddpm_faces_classes)"
        )
    number = names.index(str(label)) if str(label) in names else label
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(names):
        raise ConfigError(
            f"label={label} is not one of the {len(names)} classes of {run.checkpoint}: "
            + ", ".join(names)
        )
    conditional = NetworkDenoiser(prior.network, prior.schedule, prior.parameterization, number)
    guided = ClassifierFree(conditional, prior, scale)
    origin = f"{run.origin}; class {names[number]}, guidance scale {scale}"
    return replace(run, denoiser=guided.eval(), origin=origin)


def load_pretrained_weights(module: DiffusionModule, path: str) -> None:
    """Initializes a module from the weights of a U-Net in diffusers' format.

    Arguments:
        module: The module to be trained.
        path: A folder, or the name of a model on the Hugging Face hub.

    Raises:
        ConfigError: If the network of the folder was trained to predict something else than that
            of the module.
        RunError: If the folder cannot be used, or its network has another architecture; names the
            first tensor that differs.
    """
    theirs = interop.load_prediction_type(path) or "epsilon"
    needed, own = PREDICTIONS.get(theirs), type(module.parameterization)
    if needed is not own:
        raise ConfigError(
            f"pretrained={path} has prediction_type={theirs}, and the parameterization of the run "
            f"is {own.__name__}, under which the same output is another image; "
            + (f"set parameterization={OPTIONS[needed]}" if needed else "choose another model")
        )
    state = interop.load_unet(path).state_dict()
    for name, tensor in module.network.state_dict().items():
        given = state.get(name)
        if given is None or given.shape != tensor.shape:
            raise RunError(
                f"pretrained={path} does not fit network: {name} has shape {tuple(tensor.shape)} "
                f"here, {'missing' if given is None else tuple(given.shape)} there; choose the "
                "network= of the folder's config.json"
            )
    if more := sorted(state.keys() - module.network.state_dict().keys()):
        raise RunError(f"pretrained={path} does not fit network: {more[0]} is missing in network")
    module.network.load_state_dict(state)
    module.network_ema.load_state_dict(state)


def load_run(path: str | Path, ema: bool | float = True) -> NetworkDenoiser:
    """Returns the denoiser of a run in evaluation mode, with its averaged weights by default.

    Arguments:
        path: The run's directory or a checkpoint file.
        ema: True, False or a relative width, see `rebuild`.

    A checkpoint of somebody else may name components of this package and of torch only; the
    environment variable DIFFUSION_LAB_ALLOW lists further modules, separated by commas.

    Raises:
        RunError: If the run does not exist, or its checkpoint cannot be used.
    """
    return cast(NetworkDenoiser, rebuild(path, ema).denoiser)
