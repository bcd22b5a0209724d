"""Runs on disk: layout, checkpoints, loading, resuming."""

__all__ = [
    "EVALUATION", "FAILED", "MARKER", "OBJECTIVE", "PARTIAL", "AtomicCheckpointIO", "Run",
    "begin_evaluation", "check_same", "compose", "conditioned", "continuing", "fail", "finish",
    "load_checkpoint", "load_run", "newest_run", "objective", "pretrained", "rebuild",
    "resumed_config", "resumed_evaluation", "start_from",
]  # fmt: skip

from diffusion_lab.runs.checkpoint import AtomicCheckpointIO, load_checkpoint
from diffusion_lab.runs.compose import compose
from diffusion_lab.runs.layout import (
    EVALUATION,
    FAILED,
    MARKER,
    OBJECTIVE,
    PARTIAL,
    fail,
    finish,
    newest_run,
    objective,
)
from diffusion_lab.runs.load import Run, conditioned, load_run, pretrained, rebuild, start_from
from diffusion_lab.runs.resume import (
    begin_evaluation,
    check_same,
    continuing,
    resumed_config,
    resumed_evaluation,
)
