"""Resuming a training run or an evaluation."""

__all__ = [
    "check_resume_compatible",
    "record_evaluation",
    "remember_overrides",
    "resumed_config",
    "resumed_evaluation",
]

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.deprecated import current_config, current_overrides
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.runs.layout import EVALUATION_FILE, PARTIAL_DIR
from diffusion_lab.runs.load import Run
from diffusion_lab.runs.shell import override, shell_command
from diffusion_lab.runs.signature import is_signed_directory, sign_directory
from diffusion_lab.runs.trust import allowed_modules, compose_unsigned
from diffusion_lab.runs.typed_config import (
    read_config,
    read_overrides,
    resolve_references,
    to_dict,
)

OVERRIDES_FILE = Path(".hydra", "overrides.yaml")
CONTINUED_FILE = "continued.yaml"  # in .hydra: overrides of the commands that resumed a run
# A resumed run must have the same model, data and class of optimizer; other keys may change.
IMMUTABLE_KEYS = (
    "network", "schedule", "parameterization", "data", "seed", "pretrained", "optimizer",
)  # fmt: skip
# Hashes of the data decide whether images from another place are the same.
OVERRIDABLE_KEYS = (
    "data.batch_size", "data.source", "data.cache", "data.cache_dir", "data.image_column",
    "data.link_root", "data.memory", "data.num_workers", "data.on_error", "data.max_bad",
    "network.checkpointing",  # changes no result
)  # fmt: skip


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    result: dict[str, Any] = {}
    for key, value in config.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result


def _is_overridable(key: str) -> bool:
    setting_of_optimizer = key.startswith("optimizer.") and key != "optimizer._target_"
    return key in OVERRIDABLE_KEYS or setting_of_optimizer


def resumed_config(
    directory: Path, overrides: list[str], allow: str | list[str] | None = None
) -> DictConfig:
    """Returns the configuration of a run that is resumed.

    It is composed from the overrides of the original command, then those of the commands that
    resumed it, then those of this command.

    Arguments:
        directory: The run's directory.
        overrides: The overrides of this command; `resume=` is ignored.
        allow: Modules whose classes a directory of somebody else may name, see `trust`.

    Raises:
        RunError: If the directory is not a run with a checkpoint, or it is not of this user and
            names something that is not allowed.
        ConfigError: If model, schedule, data, seed or the class of the optimizer would change;
            lists the differences.
    """
    if not directory.is_dir():
        raise RunError(f"resume={directory} does not exist; give the directory of a run")
    if not (directory / "checkpoints" / "last.ckpt").exists():
        raise RunError(
            f"resume={directory} holds no checkpoints/last.ckpt; there is nothing to resume"
        )
    try:
        old = read_overrides(directory / OVERRIDES_FILE)
        saved = read_config(directory / ".hydra" / "config.yaml")
    except OSError as error:
        raise RunError(
            f"resume={directory} holds no .hydra/config.yaml and .hydra/overrides.yaml; "
            "the run cannot be resumed without them"
        ) from error
    new = [text for text in overrides if not text.startswith("resume=")]
    config = _compose("train", directory, [*old, *_continued(directory)], new, allow)
    check_resume_compatible(directory, resolve_references(saved), config)
    return config


def _compose(
    name: str, directory: Path, old: list[str], new: list[str], allow: Any,
    more: Sequence[str] = (),
) -> DictConfig:  # fmt: skip
    """Composes the overrides in a directory, those of this command, and more that it derives."""
    new = current_overrides([*new, *more, override("resume", directory)])
    if is_signed_directory(directory, old):
        config = hydra.compose(name, [*current_overrides(old), *new])
    else:
        modules = allowed_modules(allow)
        config = compose_unsigned(name, directory, current_overrides(old), new, modules)
    OmegaConf.update(config, "allow", allow)  # never the one that the directory names
    return config


def check_resume_compatible(directory: Path, before: dict[str, Any], config: DictConfig) -> None:
    """Checks that a resumed run keeps its model, schedule, data, seed and class of optimizer.

    Arguments:
        directory: The run's directory.
        before: The configuration of the run, or of its checkpoint.
        config: The configuration of the command that resumes it.

    Raises:
        ConfigError: If one of them would change; lists the differences.
    """
    after = to_dict(_without_paths(config))
    before = current_config(before)
    old, new = (_flat({key: each.get(key) for key in IMMUTABLE_KEYS}) for each in (before, after))
    # A key that was added after the run was made counts as off: false, zero or null.
    old |= {key: value for key, value in new.items() if key not in old and not value}
    changed = [
        f"  {key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not _is_overridable(key)
        and "${" not in str(old.get(key))  # not resolved; the checkpoint decides
    ]
    if changed:
        raise ConfigError(
            f"resume={directory} continues the same model on the same data; this would change\n"
            + "\n".join(changed)
            + "\nDrop these overrides, or start a new run without resume="
        )


def _continued(directory: Path) -> list[str]:
    """The overrides of the commands that resumed a run."""
    path = directory / ".hydra" / CONTINUED_FILE
    return read_overrides(path) if path.exists() else []


@contextmanager
def remember_overrides(directory: Path, overrides: list[str]) -> Iterator[None]:
    """Context in which a run is resumed: records the overrides for later commands.

    They are dropped again if the command fails before it has saved a step, since it may have
    failed because of them.

    Arguments:
        directory: The run's directory.
        overrides: The overrides of the command.
    """
    path, last = directory / ".hydra" / CONTINUED_FILE, directory / "checkpoints" / "last.ckpt"
    before, saved = _continued(directory), last.stat().st_mtime_ns
    new = [t for t in overrides if not t.startswith(("resume=", "hydra.", "allow="))]
    sign_directory(directory, [*read_overrides(directory / OVERRIDES_FILE), *before, *new])
    if not new:
        yield
        return
    try:
        write_atomic(path, OmegaConf.to_yaml(OmegaConf.create([*before, *new])).encode())
    except OSError as error:
        raise RunError(
            f"training stopped: {error}; the last checkpoint is intact, continue with: "
            f"{shell_command('train', resume=directory)}"
        ) from error
    try:
        yield
    except Exception:
        if last.stat().st_mtime_ns == saved:
            path.unlink()  # works on a full disk as well
            if before:
                write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(before)).encode())
        raise


def _fingerprint(path: Path) -> str | None:
    """A hash of a checkpoint; None for a folder of pretrained weights."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_evaluation(directory: Path, run: Run, *, resumed: bool) -> None:
    """Records the prior of an evaluation, or checks that a resumed evaluation still has it.

    Arguments:
        directory: The evaluation's directory.
        run: The prior.
        resumed: Whether the evaluation is resumed.

    Raises:
        RunError: If the directory holds another unfinished evaluation, or the checkpoint has
            changed since the evaluation was started.
    """
    note = directory / EVALUATION_FILE
    if (directory / "checkpoints").exists():
        raise RunError(f"{directory} holds a training; choose another hydra.run.dir")
    found = {
        "checkpoint": str(run.checkpoint.absolute()), "sha256": _fingerprint(run.checkpoint),
        "origin": run.origin,
    }  # fmt: skip
    if not resumed:
        if (directory / PARTIAL_DIR).exists():
            raise RunError(
                f"{directory} holds an unfinished evaluation; continue it with: "
                f"{shell_command('eval', resume=directory)}, or choose another hydra.run.dir"
            )
        write_atomic(note, (json.dumps(found, indent=2) + "\n").encode())
        return
    recorded = json.loads(note.read_text())
    if recorded["sha256"] != found["sha256"]:
        raise RunError(
            f"{run.checkpoint} has changed since {directory} was started ({recorded['origin']}; "
            f"now {found['origin']}); start a new evaluation without resume="
        )


def resumed_evaluation(
    directory: Path, overrides: list[str], allow: str | list[str] | None = None
) -> DictConfig:
    """Returns the configuration of an evaluation that is resumed.

    Arguments:
        directory: The evaluation's directory.
        overrides: The overrides of this command; `resume=` is ignored.
        allow: Modules whose classes a directory of somebody else may name, see `trust`.

    Raises:
        RunError: If the directory is not an unfinished evaluation, or it is not of this user and
            names something that is not allowed.
        ConfigError: If an override would change the results.
    """
    note, old = directory / EVALUATION_FILE, directory / OVERRIDES_FILE
    if not note.exists() or not old.exists():
        raise RunError(
            f"resume={directory} is not the directory of an evaluation; it has no "
            f"{EVALUATION_FILE}"
        )
    if (directory / "report.html").exists() and not (directory / PARTIAL_DIR).exists():
        raise RunError(f"resume={directory} is finished; see {directory / 'report.html'}")
    new = [text for text in overrides if not text.startswith("resume=")]
    recorded = read_overrides(old)
    free = ("trainer", "batch_size=", "data.cache_dir=", "allow=")
    fixed = [text for text in new if not text.startswith(free) and text not in recorded]
    if fixed:
        raise ConfigError(
            f"resume={directory} continues the same evaluation; {', '.join(fixed)} would "
            "change its results. Drop that, or start a new evaluation without resume="
        )
    checkpoint = str(json.loads(note.read_text())["checkpoint"])
    if "${" in checkpoint:
        raise RunError(f"{note} names the checkpoint {checkpoint}, which is not a path")
    prior = [] if any(t.startswith("model=") for t in recorded) else [override("ckpt", checkpoint)]
    return _compose("eval", directory, recorded, new, allow, ["run=null", *prior])


def _without_paths(config: DictConfig) -> DictConfig:
    """The immutable parts alone: others may refer to the Hydra state of another command."""
    parts = {key: config[key] for key in IMMUTABLE_KEYS}
    return OmegaConf.create({**parts, "paths": {"cache_dir": "", "output_dir": ""}})
