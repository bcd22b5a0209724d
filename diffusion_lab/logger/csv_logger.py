"""CSV logger that keeps exact rows when a run is resumed."""

__all__ = ["MetricsCSV"]

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from diffusion_lab.atomic_io import write_csv
from diffusion_lab.constraints import NonEmptyStr, checked


class MetricsCSV(Logger):
    """Writes metrics to `metrics.csv`, with the columns `step`, `epoch` and one for each metric.

    Lightning's CSV logger deletes the file of a run that is resumed in place. This one drops the
    rows after the checkpoint's step, which will be logged again, and keeps the others.

    Arguments:
        directory: Directory of the run.
    """

    @checked
    def __init__(self, directory: NonEmptyStr) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step", "epoch"]
        self.written = 0  # number of rows in the file
        self.resumed = 0  # number of rows from the interrupted run

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Reads the rows that an interrupted run logged before a step.

        Arguments:
            step: Number of optimizer steps in the checkpoint. Metrics are logged under the number
                of steps taken before, so rows from `step` on will be logged again.
        """
        if not self.path.exists():
            return
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or self.columns)
            self.rows = [
                row for row in reader if row["step"].isdigit() and int(row["step"]) < step
            ]
        self.resumed = len(self.rows)
        self._rewrite()

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: the configuration is in `.hydra`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a row, or extends the last row if it has the same step and none of the metrics.

        A resumed run repeats the validation at its first step; the row in the file is kept.
        """
        row = {"step": step, **metrics}
        first = max(0, self.resumed - 2)  # the last training row, and that of the validation
        for logged in self.rows[first : self.resumed]:
            if logged["step"] == str(step) and all(logged.get(name) for name in metrics):
                return
        last = self.rows[-1] if self.written < len(self.rows) else None
        if (
            last is not None
            and last["step"] == step
            and not last.keys() & metrics.keys() - {"epoch"}
        ):
            last.update(metrics)
        else:
            self.rows.append(row)

    @rank_zero_only
    def save(self) -> None:
        """Writes new rows to the file."""
        new = [key for row in self.rows[self.written :] for key in row if key not in self.columns]
        if new or not self.path.exists():
            self.columns += sorted(set(new))
            self._rewrite()
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerows(self.rows[self.written :])
        self.written = len(self.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes new rows to the file, at the end of a run or after a failure."""
        if self.rows:
            self.save()

    def _rewrite(self) -> None:
        rows = [[row.get(name) for name in self.columns] for row in self.rows]
        write_csv(self.path, self.columns, rows)
        self.written = len(self.rows)
