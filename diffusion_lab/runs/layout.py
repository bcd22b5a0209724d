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
    "EVALUATION",
    "FAILED",
    "MARKER",
    "OBJECTIVE",
    "PARTIAL",
    "fail",
    "finish",
    "newest_run",
    "objective",
]

import json
from pathlib import Path
from typing import Any

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import RunError

MARKER = "finished.json"
FAILED = "failed.json"
OBJECTIVE = "val/loss_ema"  # what a sweep minimizes
EVALUATION = "evaluation.json"  # which prior an evaluation is of
PARTIAL = "partial"  # the folder of what is done of it; it goes when it is finished
ROOT = Path("outputs/train")


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
