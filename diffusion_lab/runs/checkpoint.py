"""Checkpoint files: atomic writes, and loading that cannot run code."""

__all__ = ["AtomicCheckpointIO", "load_checkpoint"]

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffusion_lab.atomic_io import atomic_file
from diffusion_lab.errors import RunError


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code that it may hold.

    Raises:
        RunError: If it is missing, truncated, or holds anything but plain containers and tensors.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"there is no checkpoint {path}") from error
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} is not loaded: it holds code or objects besides tensors and plain containers "
            "(or is damaged); only checkpoints written by diffusion_lab are accepted"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise RunError(
            f"{path} cannot be read ({reason}); it is truncated or damaged. Use another "
            "checkpoint of the run (ckpt=.../best.ckpt)"
        ) from error
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically.

    The previous checkpoint survives an interruption. Lightning's own writer leaves an unreadable
    file if it is killed while writing.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        try:
            with atomic_file(path, path.with_name(path.name + ".partial")) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError about its own archive format
            kept = "the previous one is intact" if path.exists() else "there is no earlier one"
            raise RunError(
                f"cannot write the checkpoint {path} ({error}); is the disk full? {kept}. "
                "Free space and continue with resume=<run dir>"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))
