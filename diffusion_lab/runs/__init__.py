"""Runs on disk: layout, checkpoints, loading, resuming."""

__all__ = [
    "EVALUATION_FILE",
    "FAILED_FILE",
    "FINISHED_FILE",
    "OBJECTIVE",
    "PARTIAL_DIR",
    "AtomicCheckpointIO",
    "LockError",
    "Run",
    "check_resume_compatible",
    "compose",
    "load_checkpoint",
    "load_pretrained",
    "load_pretrained_weights",
    "load_run",
    "lock_directory",
    "lock_ranks",
    "mark_failed",
    "mark_finished",
    "newest_run",
    "non_finite_tensor",
    "objective",
    "quote_paths",
    "rebuild",
    "record_evaluation",
    "remember_overrides",
    "resumed_config",
    "resumed_evaluation",
    "shell_command",
    "sign_directory",
    "with_class_label",
]

from diffusion_lab.runs.checkpoint import AtomicCheckpointIO, load_checkpoint, non_finite_tensor
from diffusion_lab.runs.compose import compose
from diffusion_lab.runs.layout import (
    EVALUATION_FILE,
    FAILED_FILE,
    FINISHED_FILE,
    OBJECTIVE,
    PARTIAL_DIR,
    mark_failed,
    mark_finished,
    newest_run,
    objective,
)
from diffusion_lab.runs.load import (
    Run,
    load_pretrained,
    load_pretrained_weights,
    load_run,
    rebuild,
    with_class_label,
)
from diffusion_lab.runs.lock import LockError, lock_directory, lock_ranks
from diffusion_lab.runs.resume import (
    check_resume_compatible,
    record_evaluation,
    remember_overrides,
    resumed_config,
    resumed_evaluation,
)
from diffusion_lab.runs.shell import quote_paths, shell_command
from diffusion_lab.runs.signature import sign_directory
