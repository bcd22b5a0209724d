"""Resuming a training run or an evaluation."""

__all__ = ["begin_evaluation", "check_same", "continuing", "resumed_config", "resumed_evaluation"]

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.deprecated import current_config
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.runs.layout import EVALUATION, PARTIAL
from diffusion_lab.runs.load import Run

CONTINUED = "continued.yaml"  # in .hydra: overrides of the commands that have continued a run
# A resumed run must be the same model on the same images; the rest may change.
FIXED = ("network", "schedule", "parameterization", "data", "seed")
# The data's own hashes tell whether images that come from elsewhere are the same.
FREE = (
    "data.batch_size", "data.source", "data.cache", "data.cache_dir", "data.image_column",
    "data.memory", "data.num_workers", "data.on_error", "data.max_bad",
    "network.checkpointing",  # the same numbers, to the last bit
)  # fmt: skip


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
    before = current_config(before)
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
