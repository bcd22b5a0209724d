"""Entry point of the process of one rank, which `launcher.launch` starts."""

__all__ = ["main"]

import logging
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

from hydra.core.utils import configure_log

from diffusion_lab import runs
from diffusion_lab.command.evaluate import test
from diffusion_lab.command.fit import fit
from diffusion_lab.command.process import exit_with_parent, set_up_process
from diffusion_lab.errors import LabError
from diffusion_lab.runs.ranks import serve_store
from diffusion_lab.runs.typed_config import read_config


def main(command: str, folder: str) -> None:
    """Runs a command as one rank.

    Arguments:
        command: "train" or "eval".
        folder: Directory of the configuration, in which a failure is recorded.
    """
    exit_with_parent(int(os.environ["DIFFUSION_LAB_PARENT"]))
    set_up_process()
    number = int(os.environ["LOCAL_RANK"])
    if number == 0:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serve_store(address, port, int(os.environ["DIFFUSION_LAB_LISTENER"]))
        configure_log(read_config(Path(folder) / "logs.yaml"))
    else:
        logging.getLogger().setLevel(logging.ERROR)
    config = read_config(Path(folder) / "config.yaml")
    directory = Path(config.paths.output_dir)
    try:
        with runs.lock_ranks(directory) if number == 0 else nullcontext():
            {"train": fit, "eval": test}[command](config)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        text = str(error)
        if not isinstance(error, LabError):
            traceback.print_exc()
            text = f"device {number}: {type(error).__name__}: {error}"
        (Path(folder) / f"error-{number}").write_text(text)
        sys.exit(1)
