"""Command that writes the HTML report of a training, an evaluation or a sweep.

    python -m diffusion_lab.command.report outputs/train/ddpm_faces/2026-11-24_10-00-00

The report of a training (finished or not) or of a sweep is written again from its directory. An
evaluation and a leaderboard write their own reports, whose path is printed. Without a directory
the newest finished training is taken.
"""

__all__ = ["main", "report"]

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_lab import runs
from diffusion_lab.errors import LabError, RunError
from diffusion_lab.report.sweep_report import summarize
from diffusion_lab.report.training_report import write_training_report


def report(directory: Path) -> Path:
    """Returns the report of a training, an evaluation or a sweep.

    Raises:
        RunError: If the directory is none of them, or the evaluation is not finished.
    """
    page = directory / "report.html"
    if not directory.is_dir():
        raise RunError(f"{directory} is not a directory; give the directory of a run")
    if (directory / "multirun.yaml").exists():
        summarize(directory)
    elif (directory / runs.EVALUATION_FILE).exists():
        if (directory / runs.PARTIAL_DIR).exists() or not page.exists():
            raise RunError(
                f"{directory} holds an evaluation that is not finished; continue it with: "
                f"{runs.shell_command('eval', resume=directory)}"
            )
    elif not (directory / "leaderboard.csv").exists():
        write_training_report(directory)
    if not page.exists():
        raise RunError(f"{directory} holds a sweep of which no job has started")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and prints its path; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_lab.command.report",
        description="Write the HTML report of a training, an evaluation or a sweep.",
    )
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        help="directory of the run; default: the newest finished training",
    )
    directory = parser.parse_args(arguments).directory
    try:
        print(report(directory.expanduser() if directory else runs.newest_run()))
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"the report cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
