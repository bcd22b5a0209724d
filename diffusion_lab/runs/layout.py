"""Layout of a run's directory, and the files that mark its state.

outputs/train/<experiment>/<time>/
    .hydra/                   configuration and overrides
    checkpoints/last.ckpt     the newest state; best.ckpt the one of least validation loss
    metrics.csv  samples/     logged metrics and sample grids
    ema/                      snapshots of averaged weights, if ema.widths asks for them
    report.html               summary of the run in one page
    finished.json             written when training is complete
    failed.json               written when a job of a sweep has failed, with the reason
"""

__all__ = [
    "EVALUATION_FILE",
    "FAILED_FILE",
    "FINISHED_FILE",
    "OBJECTIVE",
    "PARTIAL_DIR",
    "mark_failed",
    "mark_finished",
    "newest_run",
    "objective",
]

import json
import math
from pathlib import Path
from typing import Any

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import RunError

FINISHED_FILE = "finished.json"
FAILED_FILE = "failed.json"
OBJECTIVE = "val/loss_ema"  # the metric that a sweep minimizes
EVALUATION_FILE = "evaluation.json"  # the prior that an evaluation uses
PARTIAL_DIR = "partial"  # results of an unfinished evaluation; removed at its end
ROOT = Path("outputs/train")


def mark_finished(directory: Path, **facts: Any) -> None:
    """Marks a run as finished, so that `newest_run` can find it."""
    write_atomic(directory / FINISHED_FILE, (json.dumps(facts, indent=2) + "\n").encode())
    (directory / FAILED_FILE).unlink(missing_ok=True)  # from before the run was resumed


def mark_failed(directory: Path, error: Exception) -> None:
    """Records why a job of a sweep has failed, for the summary of the sweep."""
    note = {"error": str(error) or type(error).__name__, "type": type(error).__name__}
    write_atomic(directory / FAILED_FILE, (json.dumps(note, indent=2) + "\n").encode())


def objective(directory: Path) -> float | None:
    """Returns the objective of a sweep: the last validation loss of the averaged weights.

    None if the run is not finished or the loss is NaN: a search skips the job then.
    """
    mark = directory / FINISHED_FILE
    if (directory / FAILED_FILE).exists() or not mark.exists():
        return None
    value: float | None = json.loads(mark.read_text())["metrics"].get(OBJECTIVE)
    return None if value is None or math.isnan(value) else value


def newest_run(root: Path = ROOT) -> Path:
    """Returns the run under `root` that finished last.

    Raises:
        RunError: If there is none.
    """
    marks = sorted(root.rglob(FINISHED_FILE), key=lambda path: path.stat().st_mtime_ns)
    if not marks:
        raise RunError(
            f"there is no finished run under {root.resolve()}; train one with: python train.py, "
            "or name one: run=<run dir> or ckpt=<file>"
        )
    return marks[-1].parent
