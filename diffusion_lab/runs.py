r"""Runs on disk: where they are, how one is rebuilt, and how one is continued.

outputs/train/<experiment>/<time>/
    .hydra/                   configuration and overrides
    checkpoints/last.ckpt     the newest state; best.ckpt the one of least validation loss
    metrics.csv  samples/     what was logged
    finished.json             written when training has reached its end
"""

__all__ = ["finish", "load_checkpoint", "load_run", "newest_run", "rebuild", "resumed_config"]

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffusion_lab.config import CONFIG_PATH, register_resolvers
from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.files import write_atomic
from diffusion_lab.instantiate import instantiate

MARKER = "finished.json"
ROOT = Path("outputs/train")
FORMAT = 1
# A resumed run must be the same model on the same images; the rest may change.
FIXED = ("network", "schedule", "parameterization", "data", "seed")
# The data's own hashes tell whether images that come from elsewhere are the same.
FREE = (
    "data.batch_size", "data.source", "data.cache", "data.cache_dir", "data.column",
    "data.memory", "data.num_workers", "data.on_error", "data.max_bad",
)  # fmt: skip


def finish(directory: Path, **facts: Any) -> None:
    """Marks a run as finished; `newest_run` looks for the mark."""
    write_atomic(directory / MARKER, (json.dumps(facts, indent=2) + "\n").encode())


def newest_run(root: Path = ROOT) -> Path:
    """Returns the run under `root` that was finished last.

    Raises:
        RunError: If there is none; says which command makes one.
    """
    marks = sorted(root.rglob(MARKER), key=lambda path: path.stat().st_mtime_ns)
    if not marks:
        raise RunError(
            f"there is no finished run under {root.resolve()}; train one with: python train.py, "
            "or name one: run=<run dir> or ckpt=<file>"
        )
    return marks[-1].parent


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code that it may hold.

    Raises:
        RunError: If it is missing, truncated, or holds anything but plain containers and tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} is not loaded: it holds code or objects besides tensors and plain containers "
            "(or is damaged); only checkpoints written by diffusion_lab are accepted"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise RunError(
            f"{path} cannot be read ({reason}); it is truncated or damaged. Use another "
            "checkpoint of the run (ckpt=.../best.ckpt)"
        ) from error


@dataclass(frozen=True)
class Run:
    """A run, rebuilt.

    Attributes:
        checkpoint: The file that it comes from.
        config: The run's resolved configuration.
        step: Optimizer steps taken.
        denoiser: E[x_0 | x_t] by the averaged weights, in evaluation mode.
    """

    checkpoint: Path
    config: dict[str, Any]
    step: int
    denoiser: NetworkDenoiser


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


def rebuild(path: str | Path, ema: bool = True) -> Run:
    """Rebuilds a run from its directory or from a lone checkpoint file.

    Arguments:
        path: The run's directory (then `checkpoints/last.ckpt` is taken) or a checkpoint.
        ema: Whether to take the averaged weights.

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
    config = saved["config"]
    network = _build(config, "network", file)
    prefix = "network_ema." if ema else "network."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{file}: the weights do not fit the network: {error}") from error
    denoiser = NetworkDenoiser(
        network, _build(config, "schedule", file), _build(config, "parameterization", file)
    )
    denoiser.eval().requires_grad_(False)
    return Run(file, config, checkpoint["global_step"], denoiser)


def load_run(path: str | Path, ema: bool = True) -> NetworkDenoiser:
    """Returns the denoiser of a run, by its averaged weights and in evaluation mode.

    Arguments:
        path: The run's directory or a checkpoint file.
        ema: Whether to take the averaged weights or the raw ones.

    Raises:
        RunError: If there is no such run or its checkpoint cannot be used.
    """
    return rebuild(path, ema).denoiser


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result


def resumed_config(directory: Path, overrides: list[str]) -> DictConfig:
    """Returns the configuration of a run to be continued.

    It is composed again from the overrides of the run's own command, then those of this one.

    Arguments:
        directory: The run's directory.
        overrides: The overrides of this command; `resume` among them is dropped.

    Raises:
        RunError: If the directory is not a run with a checkpoint.
        ConfigError: If what is fixed (model, schedule, data, seed) would change; shows what.
    """
    if not directory.is_dir():
        raise RunError(f"resume={directory} does not exist; give the directory of a run")
    if not (directory / "checkpoints" / "last.ckpt").exists():
        raise RunError(
            f"resume={directory} holds no checkpoints/last.ckpt; there is nothing to continue"
        )
    try:
        old = list(OmegaConf.load(directory / ".hydra" / "overrides.yaml"))
        saved = OmegaConf.load(directory / ".hydra" / "config.yaml")
    except OSError as error:
        raise RunError(
            f"resume={directory} holds no .hydra/config.yaml and .hydra/overrides.yaml; "
            "the run cannot be rebuilt without them"
        ) from error
    new = [text for text in overrides if not text.startswith("resume=")]
    config = hydra.compose("train", [*old, *new, f"resume={directory}"])
    before, after = (
        _flat({key: OmegaConf.to_container(c, resolve=True).get(key) for key in FIXED})
        for c in (_without_paths(saved), _without_paths(config))
    )
    changed = [
        f"  {key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in FREE
    ]
    if changed:
        raise ConfigError(
            f"resume={directory} continues the same model on the same data; this would change\n"
            + "\n".join(changed)
            + "\nDrop these overrides, or start a new run without resume="
        )
    return config


def _without_paths(config: DictConfig) -> DictConfig:
    """The fixed parts alone: the others may refer to Hydra's own state of another command."""
    parts = {key: config[key] for key in FIXED}
    return OmegaConf.create({**parts, "paths": {"cache_dir": "", "output_dir": ""}})


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Composes a configuration outside `hydra.main`, for notebooks and tests.

    Arguments:
        config_name: "train" or "eval".
        overrides: As on the command line.
    """
    register_resolvers()
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose(config_name, overrides)
