r"""Runs on disk: where they are, how one is rebuilt, and how one is continued.

outputs/train/<experiment>/<time>/
    .hydra/                   configuration and overrides
    checkpoints/last.ckpt     the newest state; best.ckpt the one of least validation loss
    metrics.csv  samples/     what was logged
    ema/                      snapshots of averaged weights, if ema.widths asks for them
    report.html               all of it in one page
    finished.json             written when training has reached its end
    failed.json               written when a job of a sweep has failed; why
"""

__all__ = [
    "Run", "begin_evaluation", "check_same", "conditioned", "continuing", "fail", "finish",
    "load_checkpoint", "load_run", "newest_run", "objective", "pretrained", "rebuild",
    "resumed_config", "resumed_evaluation", "start_from",
]  # fmt: skip

import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffusion_lab.config import CONFIG_PATH, register_resolvers
from diffusion_lab.denoiser import ClassifierFree, Denoiser, NetworkDenoiser
from diffusion_lab.ema import reconstruct
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.files import write_atomic
from diffusion_lab.instantiate import instantiate
from diffusion_lab.interop import diffusers as interop
from diffusion_lab.module import DiffusionModule
from diffusion_lab.parameterization import Epsilon

MARKER = "finished.json"
FAILED = "failed.json"
OBJECTIVE = "val/loss_ema"  # what a sweep minimizes
EVALUATION = "evaluation.json"  # which prior an evaluation is of
PARTIAL = "partial"  # the folder of what is done of it; it goes when it is finished
PRETRAINED = "weights from elsewhere, which very likely saw the test images"
ROOT = Path("outputs/train")
FORMAT = 1
CONTINUED = "continued.yaml"  # in .hydra: overrides of the commands that have continued a run
# A resumed run must be the same model on the same images; the rest may change.
FIXED = ("network", "schedule", "parameterization", "data", "seed")
# The data's own hashes tell whether images that come from elsewhere are the same.
FREE = (
    "data.batch_size", "data.source", "data.cache", "data.cache_dir", "data.column",
    "data.memory", "data.num_workers", "data.on_error", "data.max_bad",
    "network.checkpointing",  # the same numbers, to the last bit
)  # fmt: skip


def finish(directory: Path, **facts: Any) -> None:
    """Marks a run as finished; `newest_run` looks for the mark."""
    write_atomic(directory / MARKER, (json.dumps(facts, indent=2) + "\n").encode())
    (directory / FAILED).unlink(missing_ok=True)  # of a run that was resumed


def fail(directory: Path, error: Exception) -> None:
    """Notes why a job of a sweep has failed, for the sweep's summary."""
    note = {"error": str(error) or type(error).__name__, "type": type(error).__name__}
    write_atomic(directory / FAILED, (json.dumps(note, indent=2) + "\n").encode())


def objective(directory: Path) -> float | None:
    """Returns what a sweep minimizes: the last validation loss of the averaged weights.

    None if the run has not finished.
    """
    mark = directory / MARKER
    if (directory / FAILED).exists() or not mark.exists():
        return None
    return json.loads(mark.read_text())["metrics"].get(OBJECTIVE)


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
        origin: What the weights are, for reports.
        denoiser: E[x_0 | x_t], in evaluation mode.
        classes: The names of the classes that it knows.
    """

    checkpoint: Path
    config: dict[str, Any]
    origin: str
    denoiser: Denoiser
    classes: tuple[str, ...] = ()


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
    config = saved["config"]
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


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result


def resumed_config(directory: Path, overrides: list[str]) -> DictConfig:
    """Returns the configuration of a run to be continued.

    It is composed again from the overrides of the run's own command, then those of the commands
    that have continued it, then those of this one.

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
    config = hydra.compose("train", [*old, *_continued(directory), *new, f"resume='{directory}'"])
    check_same(directory, OmegaConf.to_container(_without_paths(saved), resolve=True), config)
    return config


def check_same(directory: Path, before: dict[str, Any], config: DictConfig) -> None:
    """Holds a configuration to go on with against one that a run was begun with.

    Arguments:
        directory: The run's directory.
        before: The configuration of the run, or of its checkpoint.
        config: That to go on with.

    Raises:
        ConfigError: If what is fixed (model, schedule, data, seed) would change; shows what.
    """
    after = OmegaConf.to_container(_without_paths(config), resolve=True)
    old, new = (_flat({key: each.get(key) for key in FIXED}) for each in (before, after))
    # A key that is newer than the run is off in it: false, zero or null.
    old |= {key: value for key, value in new.items() if key not in old and not value}
    changed = [
        f"  {key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE
    ]
    if changed:
        raise ConfigError(
            f"resume={directory} continues the same model on the same data; this would change\n"
            + "\n".join(changed)
            + "\nDrop these overrides, or start a new run without resume="
        )


def _continued(directory: Path) -> list[str]:
    """The overrides of the commands that have continued a run."""
    path = directory / ".hydra" / CONTINUED
    return list(OmegaConf.load(path)) if path.exists() else []


@contextmanager
def continuing(directory: Path, overrides: list[str]) -> Iterator[None]:
    """Around the continuation of a run: its overrides hold for later ones, too.

    Not those of a command that ends before it has taken a step: it may have been refused for them.

    Arguments:
        directory: The run's directory.
        overrides: The overrides of the command.
    """
    path, last = directory / ".hydra" / CONTINUED, directory / "checkpoints" / "last.ckpt"
    before, saved = _continued(directory), last.stat().st_mtime_ns
    new = [text for text in overrides if not text.startswith(("resume=", "hydra."))]
    if not new:
        yield
        return
    try:
        write_atomic(path, OmegaConf.to_yaml(OmegaConf.create([*before, *new])).encode())
    except OSError as error:
        raise RunError(
            f"training stopped: {error}; the last checkpoint is intact, continue with "
            f"resume={directory}"
        ) from error
    try:
        yield
    except Exception:
        if last.stat().st_mtime_ns == saved:
            path.unlink()  # also on a full disk
            if before:
                write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(before)).encode())
        raise


def _fingerprint(path: Path) -> str | None:
    """A hash of a checkpoint; None for a folder of pretrained weights."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def begin_evaluation(directory: Path, run: Run, *, resumed: bool) -> None:
    """Notes which prior an evaluation is of, or holds a resumed one against the note.

    Arguments:
        directory: The evaluation's directory.
        run: The prior.
        resumed: Whether the evaluation was begun before.

    Raises:
        RunError: If the directory holds another unfinished evaluation, or the checkpoint is not
            the one that it was begun with.
    """
    note = directory / EVALUATION
    if (directory / "checkpoints").exists():
        raise RunError(f"{directory} holds a training; choose another hydra.run.dir")
    found = {
        "checkpoint": str(run.checkpoint.absolute()), "sha256": _fingerprint(run.checkpoint),
        "origin": run.origin,
    }  # fmt: skip
    if not resumed:
        if (directory / PARTIAL).exists():
            raise RunError(
                f"{directory} holds an unfinished evaluation; go on with it: python eval.py "
                f"resume={directory}, or choose another hydra.run.dir"
            )
        write_atomic(note, (json.dumps(found, indent=2) + "\n").encode())
        return
    begun = json.loads(note.read_text())
    if begun["sha256"] != found["sha256"]:
        raise RunError(
            f"{run.checkpoint} is not what it was when {directory} was begun ({begun['origin']}; "
            f"now {found['origin']}); start a new evaluation without resume="
        )


def resumed_evaluation(directory: Path, overrides: list[str]) -> DictConfig:
    """Returns the configuration of an evaluation to go on with.

    Arguments:
        directory: The evaluation's directory.
        overrides: The overrides of this command; `resume` among them is dropped.

    Raises:
        RunError: If the directory is not an unfinished evaluation.
        ConfigError: If an override would change the results.
    """
    note, old = directory / EVALUATION, directory / ".hydra" / "overrides.yaml"
    if not note.exists() or not old.exists():
        raise RunError(
            f"resume={directory} is not the directory of an evaluation; it holds no {EVALUATION}"
        )
    if (directory / "report.html").exists() and not (directory / PARTIAL).exists():
        raise RunError(f"resume={directory} is finished; see {directory / 'report.html'}")
    new = [text for text in overrides if not text.startswith("resume=")]
    fixed = [
        text for text in new if not text.startswith(("trainer", "batch_size=", "data.cache_dir="))
    ]
    if fixed:
        raise ConfigError(
            f"resume={directory} goes on with the same evaluation; {', '.join(fixed)} would "
            "change it. Drop that, or start a new one without resume="
        )
    before = [t for t in OmegaConf.load(old) if not t.startswith(("run=", "ckpt=", "hydra."))]
    if not any(text.startswith("model=") for text in before):
        before.append(f"ckpt='{json.loads(note.read_text())['checkpoint']}'")
    return hydra.compose("eval", [*before, *new, f"resume='{directory}'"])


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
