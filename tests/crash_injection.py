"""Crash injection: a command in a separate process that records its images and kills itself.

The crash point `<place>:<n>` or `<place>:<n>:<signal>` sends the signal (default SIGKILL) to the
process when it reaches the place for the n-th time; several signals are separated by spaces. As a
script, the file takes the crash point from $CUE, so that it can also be started once per device.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

TEXT = "output.txt"  # output of the last process


def train(cue: str, directory: Path, *overrides: str, command: str = "train") -> int:
    """Runs train.py or eval.py; returns its exit code, negative if it died by a signal."""
    # The fork server imports all modules once, which saves five seconds per process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["diffusion_lab.command.cli", "diffusion_lab.callback", "crash_injection"]
    )
    process = context.Process(target=_run, args=(cue, directory, list(overrides), command))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def seen(directory: Path) -> dict[tuple[int, int, int], list[int]]:
    """The images of each (rank, epoch, batch); a repeated batch must have the same ones."""
    result = {}
    for path in sorted(directory.glob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            place, ids = json.loads(line)
            assert result.setdefault(tuple(place), ids) == ids, place
    return result


def _run(cue: str, directory: Path, overrides: list[str], command: str) -> None:
    import torch

    from diffusion_lab.command import cli

    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    descriptor = os.open(TEXT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ["DIFFUSION_LAB_CACHE"] = str(directory.parent / "cache")
    _arm(cue)
    sys.argv = [f"{command}.py", *overrides]
    {"train": cli.train, "eval": cli.evaluate}[command]()


def _arm(cue: str) -> None:
    place, count, kind, *_ = [*cue.split(":"), "SIGKILL"] if cue else ("", 0, "SIGKILL")
    count, numbers = int(count), [signal.Signals[name] for name in kind.split()]
    from diffusion_lab import atomic_io
    from diffusion_lab.callback import checkpoint
    from diffusion_lab.data.packing import Packer
    from diffusion_lab.runs import checkpoint as checkpoint_file
    from diffusion_lab.task.restoration import Restoration
    from diffusion_lab.training.module import DiffusionModule

    passed = dict.fromkeys(
        [
            "step", "stepped", "validation", "validated", "write", "replace", "written", "packed",
            "computed", "kept", "finished",
        ],
        0,
    )  # fmt: skip
    assert place == "" or place in passed, place

    def here(name: str) -> None:
        passed[name] += 1
        if name == place and passed[name] == count:
            for number in numbers:
                os.kill(os.getpid(), number)

    def around(owner: type, method: str, before: str = "", after: str = "") -> None:
        original = getattr(owner, method)

        def wrapped(*args, **kwargs):
            if before:
                here(before)
            result = original(*args, **kwargs)
            if after:
                here(after)
            return result

        setattr(owner, method, wrapped)

    training_step = DiffusionModule.training_step

    def noted(module: DiffusionModule, batch: dict, batch_idx: int):
        here("step")
        trainer = module.trainer
        line = json.dumps(
            [[trainer.global_rank, trainer.current_epoch, batch_idx], batch["index"].tolist()]
        )
        with open(f"seen-{trainer.global_rank}.jsonl", "a") as file:
            file.write(line + "\n")
        return training_step(module, batch, batch_idx)

    DiffusionModule.training_step = noted
    around(checkpoint.LastCheckpoint, "on_train_batch_end", before="stepped")
    around(DiffusionModule, "validation_step", before="validation")
    around(DiffusionModule, "on_validation_epoch_end", after="validated")
    around(checkpoint_file.AtomicCheckpointIO, "save_checkpoint", after="written")
    around(Packer, "_write", before="packed")
    around(Restoration, "compute", after="computed")
    around(Restoration, "test_step", after="kept")
    around(Restoration, "finish", after="finished")

    class Os:
        """The module `os` of atomic_io, with a crash point before a checkpoint is renamed."""

        def __getattr__(self, name: str):
            return getattr(os, name)

        def replace(self, source, target):
            if Path(target).suffix == ".ckpt":
                here("replace")
            os.replace(source, target)

    atomic_io.os = Os()
    save = checkpoint_file.torch.save

    class Torch:
        def __getattr__(self, name: str):
            return getattr(_torch, name)

        def save(self, content: dict, file):
            passed["write"] += 1
            if place == "write" and passed["write"] == count:
                file.write(b"half a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(content, file)

    _torch = checkpoint_file.torch
    checkpoint_file.torch = Torch()


if __name__ == "__main__":
    from diffusion_lab.command import cli, launcher, worker

    _arm(os.environ.get("CUE", ""))
    if "LOCAL_RANK" in os.environ:
        worker.main(*sys.argv[1:])
    else:
        launcher.PROGRAM = [sys.executable, __file__]
        cli.train()
