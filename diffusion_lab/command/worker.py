"""Entry point of the process of one rank, which `launcher.launch` starts."""

__all__ = ["follow", "main"]

import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from diffusion_lab.command.evaluate import test
from diffusion_lab.command.fit import fit
from diffusion_lab.command.process import set_up_process
from diffusion_lab.errors import LabError


def follow(pid: int) -> None:
    """Ends this process when another one is gone, however that ended: first by SIGTERM.

    Arguments:
        pid: The other process, on this machine.
    """

    def watch() -> None:
        while _alive(pid):
            time.sleep(0.5)
        for _ in range(60):  # until somebody listens; the state is saved then
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="follow").start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # gone, or the number is another user's by now
        return False
    return True


def main(command: str, folder: str) -> None:
    """What each process of `launch` does.

    Arguments:
        command: "train" or "eval".
        folder: Where the configuration is, and where a failure is noted.
    """
    follow(int(os.environ["DIFFUSION_LAB_PARENT"]))
    set_up_process()
    number = int(os.environ["LOCAL_RANK"])
    if number == 0:
        configure_log(OmegaConf.load(Path(folder) / "logs.yaml"))
    else:
        logging.getLogger().setLevel(logging.ERROR)
    config = OmegaConf.load(Path(folder) / "config.yaml")
    try:
        {"train": fit, "eval": test}[command](config)
    except Exception as error:
        text = str(error)
        if not isinstance(error, LabError):
            traceback.print_exc()
            text = f"device {number}: {type(error).__name__}: {error}"
        (Path(folder) / f"error-{number}").write_text(text)
        sys.exit(1)
