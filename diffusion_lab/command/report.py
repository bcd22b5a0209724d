"""The report of what is in a directory: one HTML page that stands alone.

    python -m diffusion_lab.tracking outputs/train/ddpm_faces/2026-11-24_10-00-00

Of a training, finished or not, the page is made anew; so it is of a sweep, from all of its jobs.
An evaluation has written its own. Without a directory it is that of the newest finished training.
"""

__all__ = ["main", "report"]

import sys
from pathlib import Path

from diffusion_lab import runs
from diffusion_lab.errors import LabError, RunError
from diffusion_lab.report.sweep_report import summarize
from diffusion_lab.report.training_report import write_training_report


def report(directory: Path) -> Path:
    """Returns the report of a training, an evaluation or a sweep.

    Raises:
        RunError: If the directory is none of them, or an evaluation that is not finished.
    """
    page = directory / "report.html"
    if not directory.is_dir():
        raise RunError(f"{directory} is not a directory; give that of a run")
    if (directory / "multirun.yaml").exists():
        summarize(directory)
    elif (directory / runs.EVALUATION).exists():
        if (directory / runs.PARTIAL).exists() or not page.exists():
            raise RunError(
                f"{directory} holds an evaluation that is not finished; go on with it: "
                f"python eval.py resume={directory}"
            )
    elif not (directory / "leaderboard.csv").exists():  # which has a page of its own
        write_training_report(directory)
    if not page.exists():
        raise RunError(f"{directory} is a sweep of which no job has begun")
    return page


def main(arguments: list[str]) -> int:
    """Makes the report and prints where it is; returns the exit code."""
    if len(arguments) > 1 or any(text.startswith("-") for text in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(report(Path(arguments[0]).expanduser() if arguments else runs.newest_run()))
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
