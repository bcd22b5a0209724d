"""Training loss per noise level, in ten bins.

A bin is a tenth of the quantiles u in [0, 1) from which training times are drawn, so that training
times fall into each bin equally often. Bin k contains u in [k / 10, (k + 1) / 10); for uniform
times these are the t in the same interval.
"""

__all__ = ["BINS", "LossBins", "bin_index", "bin_name"]

from typing import Any

import torch
from torch import Tensor

BINS = 10
EDGES = torch.arange(1, BINS, dtype=torch.float64) / BINS


def bin_index(u: Tensor) -> Tensor:
    """Returns the bin, 0 to 9, of each u in [0, 1)."""
    return torch.bucketize(u, EDGES.to(u.device), right=True)


def bin_name(k: int) -> str:
    """Returns the name of a bin: the fraction of training times below its upper end."""
    return f"{(k + 1) / BINS:.1f}"


class LossBins:
    """Running sums of the training loss in each bin, since the last row of the log.

    Attributes:
        means: The mean loss of each bin by the name of its metric, as in the last row.
    """

    def __init__(self) -> None:
        self.means: dict[str, float] = {}
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._resumed = torch.zeros(2, BINS, dtype=torch.float64)

    def update(self, u: Tensor, losses: Tensor) -> None:
        """Adds a batch.

        Arguments:
            u: The quantiles of the training times, of shape (B,).
            losses: The losses, of shape (B,).
        """
        self._batches.append((u, losses))

    def sums(self, is_global_zero: bool = True) -> Tensor:
        """Returns the sums of the losses and their numbers on this device, of shape (2, 10).

        Arguments:
            is_global_zero: Whether to include the sums of before a resume, which the checkpoint
                has for all devices together.
        """
        table = self._resumed.clone() * is_global_zero
        if self._batches:
            u, losses = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
            inside = bin_index(u)[:, None] == torch.arange(BINS, device=u.device)
            sums = torch.where(inside, losses[:, None].double(), 0).sum(0)
            table = table.to(u.device) + torch.stack([sums, inside.sum(0).double()])
        return table

    def finish_row(self, sums: Tensor) -> dict[str, float]:
        """Returns the mean loss of each bin, and starts the next row.

        A bin without any image keeps its last value.

        Arguments:
            sums: The sums over all devices, of shape (2, 10).
        """
        totals, counts = sums.tolist()
        self._batches.clear()
        self._resumed.zero_()
        for k, (total, count) in enumerate(zip(totals, counts, strict=True)):
            if count:
                self.means[f"train/loss_bin/{bin_name(k)}"] = total / count
        return self.means

    def state_dict(self, sums: Tensor) -> dict[str, Any]:
        """Returns plain containers for a checkpoint; `sums` are those over all devices."""
        return {"sums": sums.tolist(), "last": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._resumed = torch.tensor(state["sums"], dtype=torch.float64)
        self.means = dict(state["last"])
