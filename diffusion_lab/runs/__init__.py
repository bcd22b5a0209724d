"""Runs on disk: layout, checkpoints, loading, resuming."""

__all__ = [
    "EVALUATION_FILE",
    "FAILED_FILE",
    "FINISHED_FILE",
    "OBJECTIVE",
    "PARTIAL_DIR",
    "AtomicCheckpointIO",
    "Run",
    "check_resume_compatible",
    "compose",
    "load_checkpoint",
    "load_pretrained",
    "load_pretrained_weights",
    "load_run",
    "mark_failed",
    "mark_finished",
    "newest_run",
    "objective",
    "rebuild",
    "record_evaluation",
    "remember_overrides",
    "resumed_config",
    "resumed_evaluation",
    "with_class_label",
]

from diffusion_lab.runs.checkpoint import AtomicCheckpointIO, load_checkpoint
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
from diffusion_lab.runs.resume import (
    check_resume_compatible,
    record_evaluation,
    remember_overrides,
    resumed_config,
    resumed_evaluation,
)
