"""Checkpoint files: atomic writes, and loading that cannot run code."""

__all__ = ["AtomicCheckpointIO", "load_checkpoint", "non_finite_tensor"]

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffusion_lab.atomic_io import atomic_file
from diffusion_lab.errors import RunError
from diffusion_lab.runs.shell import shell_command
from diffusion_lab.runs.signature import sign


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


def non_finite_tensor(checkpoint: Mapping[str, Any]) -> str | None:
    """Returns the name of the first weight or buffer with NaN or infinity; None if there is none.

    Arguments:
        checkpoint: The content of a checkpoint.
    """
    for name, tensor in checkpoint.get("state_dict", {}).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return str(name)
    return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, with the signature of the configuration in them.

    The previous checkpoint survives an interruption. Lightning's own writer leaves an unreadable
    file if it is killed while writing. Weights that are not finite are not written: a training
    cannot recover from them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()  # those that this process has written to

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        if saved := checkpoint.get("diffusion_lab"):
            saved["signature"] = sign(saved["config"])
        kept, way_on = "There is no earlier one", "start the training again"
        if path.with_name("last.ckpt").exists():
            kept = "The last one is kept"
            way_on = f"continue with: {shell_command('train', resume=path.parents[1])}"
        if (name := non_finite_tensor(checkpoint)) is not None:
            raise RunError(
                f"the checkpoint {path} is not written: {name} is not finite after step "
                f"{checkpoint['global_step']}. {kept}; lower optimizer.lr, and {way_on}"
            )
        try:
            with atomic_file(path, path.with_name(path.name + ".partial")) as file:
                torch.save(checkpoint, file)
            self._folders.add(path.resolve().parent)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError about its own archive format
            raise RunError(
                f"cannot write the checkpoint {path} ({error}); is the disk full? {kept}. "
                f"Free space, and {way_on}"
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint in a folder that this process has written to.

        `ModelCheckpoint` reads the paths of earlier checkpoints from the one that is resumed,
        where anything may stand; Lightning removes addresses and whole folders as well.
        """
        path = Path(path)
        if path.suffix == ".ckpt" and path.resolve().parent in self._folders:
            path.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))
